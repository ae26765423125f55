"""`qtrain export merge` as a user calls it: what it writes, and every way in which it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qtrain.cli import main
from qtrain.runs.atomic import write_checksums
from qtrain.runs.manifest import base_hashes
from qtrain.runs.rundir import RunDir
from tests.export.folders import files_of
from tests.qtrain.export_command.exports import damaged_base
from tests.qtrain.tiny import save_tiny_base, save_tiny_run, write_rows
from tests.small_disk import small_disk

ROOT = Path(__file__).parents[3]
SIZES = {"hidden_size": 64, "intermediate_size": 128}  # NF4 blocks of 64 do not straddle rows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, held-out rows, a 16-bit run and a 4-bit one, each with a manifest."""
    folder = tmp_path_factory.mktemp("world")
    base = save_tiny_base(folder / "base", **SIZES)
    rows = write_rows(
        folder / "rows.jsonl", [{"instruction": f"week {n}", "output": f"total {n}"} for n in range(12)]
    )
    for name, quantization in (("plain", "none"), ("nf4", "nf4")):
        data = {"train": [str(rows)], "eval": [str(rows)]}
        run = RunDir(save_tiny_run(folder / name, base, quantization=quantization, data=data))
        run.manifest.write_text(
            json.dumps(
                {
                    "base": {"files": base_hashes(str(base))},
                    "choices": {"compute_dtype": "float32: asked for"},
                }
            )
        )
    return folder


@pytest.fixture
def copy(world: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A run of its own for a test that damages one."""

    def make(name: str) -> Path:
        shutil.copytree(world / name, tmp_path / name)
        return tmp_path / name

    return make


def _export(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of `qtrain export merge`."""
    with pytest.raises(SystemExit) as ended:
        main(["export", "merge", *map(str, words)])
    captured = capsys.readouterr()
    code = ended.value.code
    return (code if isinstance(code, int) else 0), captured.out, captured.err


def _refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line of an export that must fail with exit code 2."""
    code, _, text = _export(capsys, *words)
    assert code == 2, text
    lines = [line for line in text.splitlines() if not line.startswith(("Loading", "Writing"))]
    assert len(lines) == 1, text
    assert lines[0].startswith("error: ")
    return lines[0]


def test_a_4_bit_run_on_both_bases(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kl = {}
    for base in ("original", "dequantized"):
        code, text, errors = _export(capsys, world / "nf4", "--base", base, "--out", tmp_path / base)
        assert code == 0, errors
        assert f"{base} *" in text
        assert f"wrote {tmp_path / base}" in text.replace("\n", "")
        manifest = json.loads((tmp_path / base / "manifest.json").read_text())
        assert manifest["options"]["base"] == base
        assert manifest["report"]["bases"][base]["written"]
        kl[base] = manifest["report"]["bases"][base]["kl"]
        assert manifest["report"]["rows"] == 8
        assert manifest["stops"]["note"] is None
        assert manifest["tied_embeddings"]["tie_word_embeddings"]
        assert manifest["base"]["files"] == base_hashes(str(world / "base"))
        # both commands measured both bases, and agree
        other = {"original": "dequantized", "dequantized": "original"}[base]
        kl[f"other {base}"] = manifest["report"]["bases"][other]["kl"]
    assert kl["original"] == pytest.approx(kl["other dequantized"], rel=1e-4)
    assert kl["dequantized"] < 1e-9 < kl["original"]  # fp32 weights: what it was trained on, to rounding
    nf4 = json.loads((tmp_path / "dequantized" / "manifest.json").read_text())["options"]["nf4"]
    assert nf4 == {"double_quant": True, "blocksize": 64, "compute_dtype": "float32"}
    ours, base_files = files_of(tmp_path / "original"), files_of(world / "base")
    for name in set(base_files) - {"model.safetensors"}:
        assert ours[name] == base_files[name], name
    text = "The total of week 12 is <|im_end|>"
    for place in ("original", "dequantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path / place)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / place)
        assert tokenizer(text).input_ids == AutoTokenizer.from_pretrained(world / "base")(text).input_ids


def test_a_4_bit_run_keeps_what_it_was_trained_on(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (("--out", tmp_path / "auto"), ("--out", tmp_path / "asked", "--base", "dequantized")):
        code, text, errors = _export(capsys, world / "nf4", "--rows", "0", *words)
        assert code == 0, errors
        assert ("note: merging into the dequantised NF4" in text) == ("--base" not in words)
    files = [files_of(tmp_path / name)["model.safetensors"] for name in ("auto", "asked")]
    assert files[0] == files[1]
    manifest = json.loads((tmp_path / "auto" / "manifest.json").read_text())
    assert manifest["options"]["base"] == "dequantized"
    assert any("--base original takes the 16-bit weights" in note for note in manifest["notes"])


def test_a_16_bit_run_into_its_own_folder_and_again(
    copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy("plain")
    code, text, errors = _export(capsys, run, "--rows", "3", "--dtype", "bf16", "--max-shard-size", "100KB")
    assert code == 0, errors
    place = run / "export" / "merged"
    assert len(list(place.glob("model-*.safetensors"))) > 1
    assert json.loads((place / "config.json").read_text())["dtype"] == "bfloat16"
    assert {tensor.dtype for file in place.glob("*.safetensors") for tensor in load_file(file).values()} == {
        torch.bfloat16
    }
    assert "original *" in text
    assert "dequantized" not in text
    assert "exists already; --force replaces it" in _refused(capsys, run)
    assert _export(capsys, run, "--rows", "0", "--force")[0] == 0
    assert [path.name for path in place.glob("*.safetensors")] == ["model.safetensors"]
    assert (
        json.loads((place / "manifest.json").read_text())["report"]["missing"] == "not asked for (--rows 0)"
    )


def test_a_model_and_an_adapter(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (world / "base", "--adapter", world / "plain" / "adapter", "--out", tmp_path / "a")
    code, text, errors = _export(capsys, *words)
    assert code == 0, errors
    assert "is no run and has no rows; name a file with --data" in text
    assert _export(capsys, world / "plain", "--out", tmp_path / "b", "--rows", "0")[0] == 0
    ours, runs = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(ours[name], runs[name]) for name in runs)
    assert _export(capsys, *words[:-1], tmp_path / "c", "--data", world / "rows.jsonl", "--rows", "2")[0] == 0
    assert json.loads((tmp_path / "c" / "manifest.json").read_text())["report"]["windows"] == 2


def test_a_model_alone_is_copied(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = _export(capsys, world / "base", "--out", tmp_path / "out")
    assert code == 0
    assert "1 file, 1 copied as they were" in text
    ours, theirs = files_of(tmp_path / "out"), files_of(world / "base")
    assert {name: content for name, content in ours.items() if name != "manifest.json"} == theirs


def test_dry_run_writes_nothing(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(world.rglob("*"))
    code, text, errors = _export(capsys, world / "nf4", "--dry-run")
    assert code == 0, errors
    told = ["adapter: ", "4 modules", "recomputed: 14 of 26 tensors", "peak memory: about", "time: about"]
    for words in (*told, "nothing was written", str(world / "nf4" / "export" / "merged")):
        assert words in text
    assert sorted(world.rglob("*")) == before


def test_the_runs_own_template_and_a_model_that_never_stops(
    copy: Callable[[str], Path], world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A base whose generation config stops elsewhere, and a run that rendered with another template."""
    run = copy("plain")
    base = shutil.copytree(world / "base", tmp_path / "base")
    config = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": 0}))
    template = (base / "chat_template.jinja").read_text() + "{# the run's #}"
    (run / "adapter" / "chat_template.jinja").write_text(template)
    write_checksums(run / "adapter")
    recipe = run / "recipe.yaml"
    recipe.write_text(
        recipe.read_text()
        .replace(str(world / "base"), str(base))
        .replace("chat_template: null", f"chat_template: {run / 'gone.jinja'}")
    )
    code, text, errors = _export(capsys, run, "--rows", "2")
    assert code == 0, errors
    flat = text.replace("\n", " ")
    assert (
        "warning: the chat template ends an answer with <|im_end|> (2), and generation_config.json stops at 0"
        in flat
    )
    assert "chat template: the run's own" in flat
    assert "changed in" in flat  # since the training: generation_config.json
    merged = run / "export" / "merged"
    assert (merged / "chat_template.jinja").read_text() == template
    assert (merged / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()
    assert "would not stop" in json.loads((merged / "manifest.json").read_text())["stops"]["note"]


def test_an_unfinished_run(copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    run = copy("plain")
    RunDir(run).set_status("stopped", step=1)
    assert f"{run} is stopped, not finished; go on with: qtrain run --resume" in _refused(capsys, run)


def test_a_missing_and_a_damaged_adapter(
    copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy("plain")
    weights = run / "adapter" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    assert "adapter_model.safetensors has changed since it was written" in _refused(capsys, run)
    shutil.rmtree(run / "adapter")
    assert "the adapter of" in _refused(capsys, run)


def test_an_adapter_for_another_base_by_hash(
    copy: Callable[[str], Path], world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy("plain")
    base = save_tiny_base(tmp_path / "base", seed=1, **SIZES)
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(world / "base"), str(base)))
    line = _refused(capsys, run)
    assert f"model.safetensors of {base} is not the file that {run} was trained on (SHA-256 differs)" in line
    assert f"qtrain export merge {base} --adapter {run / 'adapter'}" in line
    assert not (run / "export").exists()


def test_an_adapter_for_another_base_by_shape(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_tiny_base(tmp_path / "base", hidden_size=32, intermediate_size=128)
    line = _refused(capsys, base, "--adapter", world / "plain" / "adapter", "--out", tmp_path / "out")
    assert "is for another base: model.layers.0.self_attn.q_proj is 64 x 64 there and 32 x 32 in" in line


def test_nan_weights(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan

    base = damaged_base(world, tmp_path / "base", change)
    line = _refused(capsys, base, "--adapter", world / "plain" / "adapter", "--out", tmp_path / "out")
    assert (
        "model.safetensors: model.layers.1.mlp.up_proj.weight holds 1 NaN and 0 infinite values of 8192"
        in line
    )
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_an_architecture_that_transformers_has_not(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(world / "base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "mystery9"}))
    words = (base, "--adapter", world / "plain" / "adapter", "--out", tmp_path / "out")
    line = _refused(capsys, *words, "--base", "dequantized")
    assert "transformers can't build this architecture" in line
    assert "mystery9" in line
    assert _export(capsys, *words)[0] == 0  # merging needs names and shapes alone


def test_corrupt_safetensors(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = shutil.copytree(world / "base", tmp_path / "base")
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    line = _refused(capsys, base, "--out", tmp_path / "out")
    assert f"{weights} is damaged or no safetensors file" in line
    assert "get the model again" in line
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_full_disk(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with small_disk(tmp_path / "disk") as disk:
        (disk / "filler").write_bytes(b"x" * 900_000)
        line = _refused(capsys, world / "plain", "--out", disk / "out")
        assert f"{disk / 'out'} needs 370" in line
        assert "free some space, or name another disk with --out" in line
        # room for the weights, and not for what comes after them
        (disk / "filler").write_bytes(b"x" * 660_000)
        line = _refused(capsys, world / "plain", "--out", disk / "out", "--rows", "0")
        assert "disk full while writing" in line
        assert [path.name for path in disk.iterdir()] == ["filler"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["plain", "--base", "dequantized"],
            "held its base in 16 bits, so that there is nothing to dequantise",
        ),
        (["plain", "--max-shard-size", "4QB"], "'4QB' is no size; write it like 4GB, 500MB or 2GiB"),
        (["plain", "--adapter", "x"], "--adapter is for a plain model"),
        (["base"], "is no run: name the folder to write with --out"),
        (["base", "--adapter", "nowhere", "--out", "new"], "nowhere holds no adapter_config.json"),
        (["./runs/v99"], "there is no run or model ./runs/v99"),
        (["plain", "--out", "new", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_other_mistakes(
    world: Path,
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(world)
    before: list[Any] = sorted(world.rglob("*"))
    assert message in _refused(capsys, *words)
    assert sorted(world.rglob("*")) == before


def test_the_console_script_is_the_same_command() -> None:
    code = "import sys; sys.argv[1:] = ['merge', '--help']; from qtrain.cli import export_main; export_main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--max-shard-size" in done.stdout
