"""`qtrain export gptq` and `awq` as a user calls them: what they write, and how they refuse."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtrain.cli import main
from qtrain.export.formats import gptq
from qtrain.export.formats.scheme import Scheme
from qtrain.export.quantized_checkpoint import QuantizedCheckpoint
from qtrain.runs.manifest import base_hashes
from qtrain.runs.rundir import RunDir
from tests.export.folders import files_of, save_model
from tests.qtrain.tiny import save_tiny_base, save_tiny_run, tiny_tokenizer, write_rows
from tests.small_disk import small_disk

ROOT = Path(__file__).parents[3]
SIZES = {"hidden_size": 64, "intermediate_size": 128}  # groups of 32 and 64 fit
# The relative error of a normal weight in groups of 32 to the nearest is 0.09 in 4 bits and 0.006 in 8;
# feedback on as few tokens as here, one or two for each input, goes further from the weight.
NEAR = {4: 0.3, 8: 0.02}
SMALL = ("--group-size", "32", "--calib", "6", "--calib-length", "32")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, one whose head is not tied, rows, a text, and a 4-bit run with held-out rows."""
    folder = tmp_path_factory.mktemp("world")
    base = save_tiny_base(folder / "base", **SIZES)
    save_tiny_base(folder / "untied", tie_word_embeddings=False, **SIZES)
    rows = [{"instruction": f"week {n}", "output": f"total {n}, growth {n * n}"} for n in range(24)]
    train = write_rows(folder / "train.jsonl", rows[:20])
    held_out = write_rows(folder / "held-out.jsonl", rows[20:])
    (folder / "text.txt").write_text("The total of the week is 120.\nThe growth is 5 percent.\n" * 200)
    data = {"train": [str(train)], "eval": [str(held_out)]}
    run = RunDir(save_tiny_run(folder / "run", base, quantization="nf4", data=data, scale=0.05))
    run.manifest.write_text(
        json.dumps(
            {
                "base": {"files": base_hashes(str(base))},
                "choices": {"compute_dtype": "float32: asked for"},
            }
        )
    )
    return folder


def _export(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of `qtrain export`."""
    with pytest.raises(SystemExit) as ended:
        main(["export", *map(str, words)])
    captured = capsys.readouterr()
    code = ended.value.code
    return (code if isinstance(code, int) else 0), captured.out, captured.err


def _refused(capsys: pytest.CaptureFixture[str], *words: object, code: int = 2) -> str:
    """The one line of an export that must fail."""
    found, _, text = _export(capsys, *words)
    assert found == code, text
    lines = [line for line in text.splitlines() if not line.startswith(("Loading", "Writing"))]
    assert len(lines) == 1, text
    assert lines[0].startswith("error: ")
    return lines[0]


def _manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found


def test_a_run_on_its_own_rows(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(world / "run", tmp_path / "run")
    code, text, errors = _export(capsys, "gptq", run, *SMALL)
    assert code == 0, errors
    assert "layer 2/2: q_proj " in text
    place = run / "export" / "gptq"
    assert sorted(path.name for path in place.parent.iterdir()) == ["gptq"]  # no journal, no partial folder
    config = json.loads((place / "config.json").read_text())
    assert config["dtype"] == "float16"
    assert config["quantization_config"] == json.loads((place / "quantize_config.json").read_text())
    ours, theirs = files_of(place), files_of(world / "base")
    for name in set(theirs) - {"model.safetensors", "config.json"}:
        assert ours[name] == theirs[name], name
    manifest = _manifest(place)
    assert manifest["calibration"]["rows_available"] == 20
    assert manifest["calibration"]["windows"] == 6
    assert manifest["base"]["files"] == base_hashes(str(world / "base"))
    assert manifest["adapter"]["modules"] == 4
    gate = manifest["gate"]
    assert gate["held_out"]
    assert gate["rows"] == 4
    assert gate["result"]["passed"]
    assert gate["result"]["stops"]["places"] == 4
    assert all(0 < error < 0.05 for error in manifest["errors"].values())
    assert len(manifest["errors"]) == 14
    # what the gate read is what the files say: unpacked here by the format's definition
    tensors = load_file(place / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    parts = {suffix: tensors[f"{name}.{suffix}"] for suffix in ("qweight", "qzeros", "scales", "g_idx")}
    expected = gptq.unpack(parts, Scheme(4, 32)).dequantize()
    assert torch.equal(QuantizedCheckpoint.open(place).dequantized(name), expected)
    original = load_file(world / "base" / "model.safetensors")[f"{name}.weight"]
    assert (expected - original).norm() < NEAR[4] * original.norm()


@pytest.mark.parametrize(
    ("algorithm", "container", "more"),
    [
        ("gptq", "gptq", ["--asym"]),
        ("gptq", "gptq", ["--act-order", "full", "--bits", "8"]),
        ("gptq", "compressed-tensors", ["--asym", "--group-size", "-1"]),
        ("gptq", "gptq", ["--set", "modules.down_proj.bits=8", "--set", "modules.layers.0.mlp.bits=16"]),
        ("awq", "awq", []),
        ("awq", "awq", ["--no-zero-point", "--rounding", "nearest", "--set", "modules.o_proj.bits=16"]),
        ("awq", "compressed-tensors", ["--set", "modules.down_proj.group_size=64"]),
    ],
)
def test_every_container_is_read_back_as_it_was_meant(
    algorithm: str,
    container: str,
    more: list[str],
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    words = (algorithm, world / "base", *SMALL, "--calib-data", world / "train.jsonl", "--out", out)
    code, text, errors = _export(capsys, *words, "--format", container, *more)
    assert code == 0, errors
    found = QuantizedCheckpoint.open(out)
    assert found.container == container
    base = load_file(world / "base" / "model.safetensors")
    if algorithm == "gptq":  # AWQ folds scales into weights and norms
        for module, scheme in found.schemes.items():
            weight, ours = base[f"{module}.weight"], found.dequantized(module)
            assert (ours - weight).norm() < NEAR[scheme.bits] * weight.norm(), module
    bits = {module: scheme.bits for module, scheme in found.schemes.items()}
    if "--bits" in more:
        assert "vLLM refuses full activation order" in text
        assert set(bits.values()) == {8}
    if "modules.down_proj.bits=8" in more:
        assert "model.layers.0.mlp.down_proj" not in bits
        assert bits["model.layers.1.mlp.down_proj"] == 8
        assert bits["model.layers.0.self_attn.q_proj"] == 4
    if "modules.o_proj.bits=16" in more:
        assert "model.layers.0.self_attn.o_proj" not in bits
    assert _export(capsys, "verify", out)[0] == 0


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "mistral"])
def test_every_architecture(
    architecture: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_model(tmp_path / "base", architecture)
    tiny_tokenizer().save_pretrained(base)
    words = (*SMALL, "--calib-data", world / "text.txt", "--gate", "kl=1,ppl=3", "--out", tmp_path / "out")
    code, _, errors = _export(capsys, "awq", base, *words, "--max-shard-size", "50KB")
    assert code == 0, errors
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert _export(capsys, "verify", tmp_path / "out")[0] == 0


def test_a_head_of_its_own(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (*SMALL, "--calib-data", world / "text.txt", "--lm-head", "--out", tmp_path / "out")
    code, _, errors = _export(capsys, "gptq", world / "untied", *words)
    assert code == 0, errors
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["lm_head"]
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert "lm_head.qweight" in names
    assert "lm_head.weight" not in names
    assert 0 < _manifest(tmp_path / "out")["errors"]["lm_head"] < 0.05
    assert _export(capsys, "verify", tmp_path / "out")[0] == 0
    assert "tied to the embedding, which stays in 16 bits" in _refused(
        capsys, "gptq", world / "base", *words[:-1], tmp_path / "other"
    )


def test_below_the_gate(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (world / "base", *SMALL, "--calib-data", world / "text.txt", "--out", tmp_path / "out")
    line = _refused(capsys, "gptq", *words, "--gate", "kl=1e-6", code=1)
    assert "out.rejected is below the gate: KL 0." in line
    assert "is above 1e-06" in line
    assert [path.name for path in tmp_path.iterdir()] == ["out.rejected"]
    result = _manifest(tmp_path / "out.rejected")["gate"]["result"]
    assert not result["passed"]
    assert result["bounds"]["kl"] == 1e-6
    assert "KL" in _refused(capsys, "verify", tmp_path / "out.rejected", code=1)
    assert _export(capsys, "verify", tmp_path / "out.rejected", "--gate", "kl=1")[0] == 0
    assert _export(capsys, "gptq", *words, "--gate", "off")[0] == 0
    assert _manifest(tmp_path / "out")["gate"]["result"]["bounds"] == "off"


KILLED = """
import os, signal, sys
from qtrain.cli import main
from qtrain.export_command.progress import ModuleProgress

def die(self, step):
    if step.module.endswith(sys.argv[1]):
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))

ModuleProgress.step = die
main(sys.argv[3:])
"""


LATER = """
import os, signal, sys
from qtrain.cli import main
from qtrain.export.writer import CheckpointWriter

CheckpointWriter.seal = lambda *_: os.kill(os.getpid(), getattr(signal, sys.argv[2]))
main(sys.argv[3:])
"""


def _stopped(where: str, how: str, *words: object, code: str = KILLED) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, where, how, "export", *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, check=False, capture_output=True, text=True, env=environment, timeout=120
    )


def test_killed_and_resumed_is_the_same_to_the_byte(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("gptq", world / "untied", *SMALL, "--calib-data", world / "text.txt", "--lm-head")
    died = _stopped("layers.1.mlp.up_proj", "SIGKILL", *words, "--out", tmp_path / "killed")
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["killed.journal"]
    line = _refused(capsys, *words, "--out", tmp_path / "killed")
    assert "holds an unfinished export; go on with it: --resume, or begin anew: --force" in line
    line = _refused(capsys, *words, "--out", tmp_path / "killed", "--resume", "--damp", "0.1")
    assert "was begun differently" in line
    # again, with all layers done and the checkpoint half written
    died = _stopped("", "SIGKILL", *words, "--out", tmp_path / "killed", "--resume", code=LATER)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert "resumed: 1 of 2 layers are done already" in died.stdout
    assert "layer 1/2" not in died.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.journal", "killed.partial"]
    code, text, errors = _export(capsys, *words, "--out", tmp_path / "killed", "--resume")
    assert code == 0, errors
    assert "resumed: 2 of 2 layers are done already" in text
    assert _export(capsys, *words, "--out", tmp_path / "whole")[0] == 0
    ours, expected = files_of(tmp_path / "killed"), files_of(tmp_path / "whole")
    manifests = [json.loads(files.pop("manifest.json")) for files in (ours, expected)]
    assert ours == expected
    for its in manifests:
        for name in ("time", "command", "seconds"):
            del its[name]
    assert manifests[0] == manifests[1]


def test_ctrl_c_says_how_to_go_on(world: Path, tmp_path: Path) -> None:
    words = ("awq", world / "base", *SMALL, "--calib-data", world / "text.txt", "--out", tmp_path / "out")
    stopped = _stopped("layers.1.mlp.up_proj", "SIGINT", *words)
    assert stopped.returncode == 130
    assert "the same command with --resume goes on from there" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.journal"]


def test_dry_run_tells_the_sizes_to_the_byte(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ("gptq", world / "run", *SMALL, "--set", "modules.k_proj.bits=16", "--out", out)
    code, text, errors = _export(capsys, *words, "--dry-run")
    assert code == 0, errors
    assert not list(tmp_path.iterdir())
    for told in ("peak memory: about", "time: about", "nothing was written", "k_proj", "in 16 bits"):
        assert told in text
    assert _export(capsys, *words)[0] == 0
    size = sum(tensor.nbytes for tensor in load_file(out / "model.safetensors").values())
    assert f"{size:,} bytes" in text


def test_rows_kept_back_are_not_calibrated_on(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"instruction": f"row {n}", "output": f"number {n}"} for n in range(40)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    words = (world / "base", "--group-size", "32", "--calib", "100", "--calib-length", "32")
    assert _export(capsys, "gptq", *words, "--calib-data", data, "--out", tmp_path / "out")[0] == 0
    manifest = _manifest(tmp_path / "out")
    assert manifest["calibration"]["rows_available"] == 36
    assert manifest["gate"]["rows"] == 4
    assert manifest["gate"]["held_out"]
    # nine rows are too few to keep one back
    few = write_rows(tmp_path / "few.jsonl", rows[:9])
    code, text, _ = _export(capsys, "gptq", *words, "--calib-data", few, "--out", tmp_path / "few")
    assert code == 0
    assert "measured on rows that it was calibrated on" in text
    assert not _manifest(tmp_path / "few")["gate"]["held_out"]


def _damaged_base(world: Path, place: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    base = shutil.copytree(world / "base", place)
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    return base


def test_nan_weights(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan

    base = _damaged_base(world, tmp_path / "base", change)
    words = (base, *SMALL, "--calib-data", world / "text.txt", "--out", tmp_path / "out")
    line = _refused(capsys, "gptq", *words)
    assert "model.layers.1.mlp.up_proj.weight holds 1 NaN and 0 infinite values" in line
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_values_beyond_float16_are_stored_in_bfloat16(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][3] = 1e5

    base = _damaged_base(world, tmp_path / "base", change)
    words = (base, *SMALL, "--calib-data", world / "text.txt", "--out", tmp_path / "out", "--gate", "off")
    code, text, errors = _export(capsys, "gptq", *words)
    assert code == 0, errors
    assert "model.norm.weight holds values up to 1e+05, beyond float16" in text
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert "beyond float16" in _manifest(tmp_path / "out")["stored_dtype"]["reason"]


def test_corrupt_safetensors(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = shutil.copytree(world / "base", tmp_path / "base")
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    words = (base, *SMALL, "--calib-data", world / "text.txt", "--out", tmp_path / "out")
    assert f"{weights} is damaged or no safetensors file" in _refused(capsys, "awq", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_an_architecture_without_decoder_layers_of_linears(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(world / "base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "mystery9"}))
    words = (base, *SMALL, "--calib-data", world / "text.txt", "--out", tmp_path / "out")
    line = _refused(capsys, "gptq", *words)
    assert "Qwen2, Qwen3, Llama and Mistral are supported" in line
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_an_adapter_for_another_base(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_tiny_base(tmp_path / "base", hidden_size=32, intermediate_size=128)
    words = (*SMALL, "--calib-data", world / "text.txt", "--out", tmp_path / "out")
    line = _refused(capsys, "gptq", base, "--adapter", world / "run" / "adapter", *words)
    assert "is for another base: model.layers.0.self_attn.q_proj is 64 x 64 there and 32 x 32 in" in line


def test_a_full_disk(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (world / "base", *SMALL, "--calib-data", world / "text.txt", "--gate", "off")
    with small_disk(tmp_path / "disk") as disk:
        (disk / "filler").write_bytes(b"x" * 950_000)
        line = _refused(capsys, "gptq", *words, "--out", disk / "out")
        assert f"{disk / 'out'} needs 1" in line
        assert [path.name for path in disk.iterdir()] == ["filler"]
        # room for the layers, and not for the checkpoint after them: it goes on where there is room again
        (disk / "filler").write_bytes(b"x" * 855_000)
        line = _refused(capsys, "gptq", *words, "--out", disk / "out")
        assert "disk full while writing" in line
        assert sorted(path.name for path in disk.iterdir()) == ["filler", "out.journal"]
        (disk / "filler").unlink()
        code, text, errors = _export(capsys, "gptq", *words, "--out", disk / "out", "--resume")
        assert code == 0, errors
        assert "resumed: 2 of 2 layers" in text
        assert [path.name for path in disk.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gptq", "base", *SMALL, "--out", "new"], "give rows like those it will see: --calib-data FILE"),
        (
            ["gptq", "base", "--out", "new", "--calib-data", "text.txt"],
            "group_size 128 does not divide its in_features 64 (nor those of 11 others)",
        ),
        (["gptq", "run", "--bits", "3"], "--bits is 3, must be one of 2, 4, 8"),
        (["gptq", "run", "--group-size", "48"], "--group-size is 48, must be one of 32, 64, 128, -1"),
        (["gptq", "run", "--act-order", "ful"], "--act-order is ful, must be one of static, off, full"),
        (["gptq", "run", "--format", "awq"], "--format is awq, must be one of gptq, compressed-tensors"),
        (["gptq", "run", "--rounding", "up"], "--rounding is up, must be one of gptq, nearest"),
        (["gptq", "run", "--damp", "2"], "--damp is 2, must be 0 .. 1"),
        (["gptq", "run", "--calib", "0"], "--calib is 0, must be 1 or more"),
        (["gptq", "run", "--gate", "ppk=3"], "did you mean ppl?"),
        (["gptq", "run", "--gate", "kl=-1"], "kl is '-1', must be a number of 0 or more"),
        (["gptq", "run", "--rows", "0"], "--rows 0 leaves nothing to measure; give --gate off with it"),
        (["gptq", "run", *SMALL, "--set", "modules.dwn_proj.bits=8"], "did you mean modules.down_proj.bits?"),
        (["gptq", "run", *SMALL, "--set", "modules.down_proj.bit=8"], "did you mean modules.down_proj.bits?"),
        (["gptq", "run", *SMALL, "--set", "module.down_proj.bits=8"], "did you mean modules.down_proj.bits?"),
        (["gptq", "run", *SMALL, "--set", "modules.down_proj.bits=5"], "'5' must be one of 2, 4, 8, 16"),
        (["gptq", "run", *SMALL, "--set", "modules.model.bits=16"], "leaves every module in 16 bits"),
        (["awq", "run", "--bits", "8"], "AWQ GEMM holds 4 bits, not 8; use --format compressed-tensors"),
        (["awq", "run", "--act-order", "full"], "--format awq has no g_idx; use --act-order static"),
        (["awq", "run", *SMALL, "--set", "modules.q_proj.group_size=64"], "one scheme for all modules"),
        (["awq", "untied", *SMALL, "--lm-head", "--out", "new"], "readers of AWQ GEMM keep the head in 16"),
        (
            ["gptq", "run", *SMALL, "--calib-length", "4096", "--calib-data", "text.txt"],
            "windows of 4096 tokens, but the model's max_position_embeddings is 2048",
        ),
        (["gptq", "run", *SMALL[:-1], "1024"], "less than one window of 1024"),
        (["gptq", "run", *SMALL, "--calib-data", "nowhere.txt"], "nowhere.txt: there is no such file"),
        (["gptq", "run", *SMALL, "--calib-data", "nowhere.jsonl"], "nowhere.jsonl: there is no such file"),
        (["gptq", "run", "--device", "tpu"], "--device is tpu, must be one of auto, cpu, cuda"),
        (["gptq", "base", *SMALL, "--adapter", "gone", "--out", "new"], "gone holds no adapter_config.json"),
        (["gptq", "./runs/v9"], "there is no run or model ./runs/v9"),
        (["verify", "base"], "is not quantised: its config.json has no quantization_config"),
        (["verify", "nowhere"], "nowhere holds no config.json; give a quantised model folder"),
    ],
)
def test_mistakes(
    world: Path,
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(world)
    before = sorted(world.rglob("*"))
    assert message in _refused(capsys, *words)
    assert sorted(world.rglob("*")) == before


def test_what_is_there_is_not_written_over(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    words = ("gptq", world / "run", *SMALL, "--out", tmp_path / "out")
    assert "exists already; --force replaces it" in _refused(capsys, *words)
    assert _export(capsys, *words, "--force")[0] == 0
    assert not (tmp_path / "out" / "mine").exists()
