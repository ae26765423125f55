"""`qtrain export verify` on folders of other programs' making, and on damaged ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtrain.cli import main
from qtrain.export.formats.words import pack_columns, unpack_columns
from qtrain.export.quantized_checkpoint import QuantizedCheckpoint
from qtrain.export.streamed_model import StreamedModel
from qtrain.export_command import verify_reader
from qtrain.export_command.readers import Reading
from tests.export.folders import save_model
from tests.qtrain.tiny import save_tiny_base, write_rows

SMALL = ("--group-size", "32", "--calib", "6", "--calib-length", "32")
NAME = "model.layers.1.mlp.up_proj"

pytestmark = pytest.mark.usefixtures("one_thread")


def _run(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["export", *map(str, words)])
    return ended.value.code if isinstance(ended.value.code, int) else 0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, rows, and one export of each container."""
    folder = tmp_path_factory.mktemp("world")
    base = save_tiny_base(folder / "base", hidden_size=64, intermediate_size=128)
    rows = [{"instruction": f"week {n}", "output": f"total {n}"} for n in range(20)]
    data = write_rows(folder / "rows.jsonl", rows)
    exports = {
        "gptq": ["gptq"],
        "asymmetric": ["gptq", "--asym"],
        "awq": ["awq"],
        "compressed": ["gptq", "--format", "compressed-tensors"],
    }
    for name, (command, *more) in exports.items():
        words = (command, base, *SMALL, *more, "--calib-data", data, "--gate", "off", "--out", folder / name)
        assert _run(*words) == 0
    return folder


@pytest.fixture
def changed(world: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of an export without its manifest, its tensors and its config changed."""

    def make(
        name: str,
        tensors: Callable[[dict[str, Tensor]], None] = lambda _: None,
        config: Callable[[dict[str, Any]], None] = lambda _: None,
        manifest: bool = False,
    ) -> Path:
        folder = shutil.copytree(world / name, tmp_path / name)
        if not manifest:
            (folder / "manifest.json").unlink()
        found = load_file(folder / "model.safetensors")
        tensors(found)
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
        its = json.loads((folder / "config.json").read_text())
        config(its)
        (folder / "config.json").write_text(json.dumps(its))
        return folder

    return make


def _verify(
    folder: Path, world: Path, capsys: pytest.CaptureFixture[str], *more: object
) -> tuple[int, str, str]:
    code = _run("verify", folder, "--reference", world / "base", "--data", world / "rows.jsonl", *more)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("name", ["gptq", "asymmetric"])
def test_version_2_stores_zero_points_themselves(
    name: str, world: Path, changed: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def add_one(tensors: dict[str, Tensor]) -> None:
        for key in tensors:
            if key.endswith(".qzeros"):
                tensors[key] = pack_columns(unpack_columns(tensors[key], 4) + 1, 4)

    def version(config: dict[str, Any]) -> None:
        config["quantization_config"]["checkpoint_format"] = "gptq_v2"

    folder = changed(name, add_one, version)
    before = QuantizedCheckpoint.open(world / name).dequantized(NAME)
    assert torch.equal(QuantizedCheckpoint.open(folder).dequantized(NAME), before)
    code, text, errors = _verify(folder, world, capsys)
    assert code == 0, errors
    assert "gptq_v2, 14 packed modules" in text
    assert "has no manifest.json: files are not compared with hashes" in text


def test_a_zero_point_below_zero_is_read_in_whole_words(world: Path, changed: Callable[..., Path]) -> None:
    """GPTQModel takes 1 from whole words: a z of 0 borrows from the next one's place."""
    zeros: list[Tensor] = []

    def change(tensors: dict[str, Tensor]) -> None:
        found = unpack_columns(tensors[f"{NAME}.qzeros"], 4) + 1
        found[:, ::3] = 0
        zeros.append(found)
        words = pack_columns(found, 4).to(torch.int64) - 0x11111111
        tensors[f"{NAME}.qzeros"] = ((words + 2**31) % 2**32 - 2**31).to(torch.int32)

    folder = changed("asymmetric", change)
    tensors = load_file(folder / "model.safetensors")
    q = unpack_columns(tensors[f"{NAME}.qweight"].t().contiguous(), 4).float()  # [N, K]
    scales = tensors[f"{NAME}.scales"].float().t().repeat_interleave(32, 1)
    expected = scales * (q - zeros[0].float().t().repeat_interleave(32, 1))
    assert torch.equal(QuantizedCheckpoint.open(folder).dequantized(NAME), expected)


def test_as_other_programs_write_it(
    world: Path, changed: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """bfloat16 scales, targets by pattern; and GPTQ that is told of in quantize_config.json alone."""

    def shorten(tensors: dict[str, Tensor]) -> None:
        for key in tensors:
            if key.endswith(".weight_scale"):
                tensors[key] = tensors[key].bfloat16()

    def pattern(config: dict[str, Any]) -> None:
        group = config["quantization_config"]["config_groups"]["group_0"]
        group["targets"] = [r"re:.*(_proj)$"]

    folder = changed("compressed", shorten, pattern)
    exact = QuantizedCheckpoint.open(world / "compressed").dequantized(NAME)
    found = QuantizedCheckpoint.open(folder).dequantized(NAME)
    assert 0 < (found - exact).abs().max() <= exact.abs().max() * 2**-8  # half a step of 8 bits
    assert _verify(folder, world, capsys)[0] == 0
    beside = changed("gptq", config=lambda config: config.pop("quantization_config"))
    assert _verify(beside, world, capsys)[0] == 0


@pytest.mark.parametrize("name", ["gptq", "awq", "compressed"])
def test_a_module_that_is_wrong_is_seen(
    name: str, world: Path, changed: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Scales of one module with the other sign: every reader would load it, and only the figures tell."""
    assert _verify(world / name, world, capsys, "--gate", "kl=0.3,ppl=9")[0] == 0
    module = "model.layers.1.mlp.down_proj"

    def negate(tensors: dict[str, Tensor]) -> None:
        for key in (f"{module}.scales", f"{module}.weight_scale"):
            if key in tensors:
                tensors[key] = -tensors[key]

    folder = changed(name, negate)
    code, _, errors = _verify(folder, world, capsys, "--gate", "kl=0.3,ppl=9")
    assert code == 1
    assert "is below the gate: KL " in errors


@pytest.mark.parametrize(
    ("name", "tensors", "config", "message"),
    [
        ("gptq", lambda t: t.pop(f"{NAME}.scales"), None, f"has no tensor {NAME}.scales"),
        ("gptq", lambda t: t.pop("model.norm.weight"), None, "has no tensor model.norm.weight"),
        (
            "awq",
            lambda t: t[f"{NAME}.scales"].view(-1)[3:4].fill_(float("nan")),
            None,
            f"{NAME}.scales holds 1 NaN",
        ),
        (
            "compressed",
            lambda t: t.update({f"{NAME}.weight_packed": t[f"{NAME}.weight_packed"][:, 1:].contiguous()}),
            None,
            f"{NAME}.weight_packed is [128, 7], by config.json it must be [128, 8]",
        ),
        ("gptq", lambda t: t[f"{NAME}.g_idx"].fill_(9), None, "g_idx holds values outside of 0 .. 1"),
        ("gptq", lambda t: t[f"{NAME}.qzeros"].zero_(), None, "zero points other than 8"),
        (
            "gptq",
            None,
            lambda c: c["quantization_config"].update(group_size=64),
            "by config.json it must be",
        ),
        (
            "gptq",
            None,
            lambda c: c["quantization_config"].update(checkpoint_format="marlin"),
            "is quantised as gptq in marlin layout",
        ),
        ("awq", None, lambda c: c["quantization_config"].update(version="gemv"), "as awq in gemv layout"),
        ("awq", None, lambda c: c["quantization_config"].update(quant_method="fp8"), "is quantised as fp8"),
    ],
)
def test_damage(
    name: str,
    tensors: Any,
    config: Any,
    message: str,
    world: Path,
    changed: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = changed(name, tensors or (lambda _: None), config or (lambda _: None))
    code, _, errors = _verify(folder, world, capsys)
    assert code == 2
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert message in errors


def test_a_file_that_is_not_the_manifests(
    world: Path, changed: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = changed("gptq", lambda t: t[f"{NAME}.qweight"][0, :1].bitwise_xor_(1), manifest=True)
    code, _, errors = _verify(folder, world, capsys)
    assert code == 2
    assert "model.safetensors is damaged: its SHA-256 is not the manifest's" in errors
    (folder / "model.safetensors").unlink()
    assert "model.safetensors is missing" in _verify(folder, world, capsys)[2]


def test_what_the_manifest_says_is_enough(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(world / "awq", tmp_path / "awq")
    monkeypatch.chdir(tmp_path)
    assert _run("verify", "awq") == 0
    text = capsys.readouterr().out
    recorded = json.loads((folder / "manifest.json").read_text())["gate"]["result"]
    assert "KL (nats)" in text
    assert f"{recorded['kl']:.4f}" in text  # the rows that were kept back, again
    (folder / "tokenizer_config.json").write_text("{}")
    _run("verify", "awq")
    assert "tokenizer_config.json has changed since the export" in capsys.readouterr().out.replace("\n", "")
    (folder / "manifest.json").unlink()
    assert _run("verify", "awq") == 2
    assert "name it: --reference RUN|MODEL" in capsys.readouterr().err


def test_a_reference_that_it_was_not_made_of(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("verify", world / "gptq", "--data", world / "rows.jsonl", "--gate", "off", "--reference")
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    other = save_tiny_base(tmp_path / "other", seed=1, **sizes)
    capsys.readouterr()
    assert _run(*words, other) == 0
    text = capsys.readouterr().out
    assert f"note: {other} is not the base that {world / 'gptq'} was made of (SHA-256 differs)" in text
    assert _run(*words, world / "base") == 0
    assert "SHA-256 differs" not in capsys.readouterr().out

    larger = save_model(shutil.copytree(world / "base", tmp_path / "larger"), shard="1GB", vocab_size=5000)
    capsys.readouterr()
    assert _run(*words, larger) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"error: {larger} has 5000 tokens and {world / 'gptq'} " in error
    assert "name the model that it was made of" in error


def test_more_rows_than_the_export_was_measured_on(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = write_rows(
        tmp_path / "held-out.jsonl", [{"instruction": f"day {n}", "output": "x"} for n in range(9)]
    )
    words = ("--calib-data", world / "rows.jsonl", "--data", held_out, "--rows", 2, "--out", tmp_path / "out")
    assert _run("gptq", world / "base", *SMALL, *words, "--gate", "off") == 0
    measured = {}
    for rows in (2, 7, 50):
        capsys.readouterr()
        assert _run("verify", tmp_path / "out", "--rows", rows) == 0
        text = capsys.readouterr().out.replace("\n", " ")
        measured[rows] = int(text.split("16 bits, ")[1].split()[0])
        assert ("measured on 9 rows" in text) == (rows == 50)
    assert measured[2] * 7 == measured[7] * 2 == measured[50] * 14 / 9
    assert _run("verify", world / "gptq", "--rows", 50) == 0  # others than those kept back were calibrated on
    assert "measured on 2 rows" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(("off_by", "code"), [(0.01, 0), (1.0, 1)])
def test_a_reader_is_held_to_our_reading(
    off_by: float,
    code: int,
    world: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A reader whose log-probs are ours but for a constant; real ones are in tests/interop."""

    def read_with(
        reader: str, folder: Path, windows: list[list[int]], prompts: list[list[int]], **more: Any
    ) -> Reading:
        model = StreamedModel(folder, QuantizedCheckpoint.open(folder).weight)
        states = torch.stack(model.hidden_states(windows))
        found = model.logits(states.flatten(0, 1)).view(*states.shape[:2], -1)[:, :-1].log_softmax(-1)
        top = found.topk(3)
        targets = found.gather(2, torch.tensor(windows)[:, 1:, None])[..., 0]
        greedy = torch.zeros(len(prompts), 2, dtype=torch.int64)
        return Reading(
            reader, {"version": "1"}, 0.0, targets + off_by, top.indices, top.values + off_by, prompts, greedy
        )

    monkeypatch.setattr(verify_reader, "read_with", read_with)
    monkeypatch.setattr(verify_reader, "missing", lambda _: None)
    found, text, errors = _verify(world / "awq", world, capsys, "--reader", "vllm")
    assert found == code, errors
    assert "vllm (version 1): log-probs differ by" in text
    assert ("vllm reads another model" in errors) is bool(code)
