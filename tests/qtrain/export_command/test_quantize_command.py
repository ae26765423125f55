"""`qtrain export gptq` and `awq` as a user calls them: what they write, and after a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qtrain.export.formats import gptq
from qtrain.export.formats.scheme import Scheme
from qtrain.export.quantized_checkpoint import QuantizedCheckpoint
from qtrain.runs.manifest import base_hashes
from tests.export.folders import files_of, save_model
from tests.qtrain.export_command.exports import SMALL, export, make_world, manifest_of, refused
from tests.qtrain.tiny import tiny_tokenizer, write_rows

ROOT = Path(__file__).parents[3]
# The relative error of a normal weight in groups of 32 to the nearest is 0.09 in 4 bits and 0.006 in 8;
# feedback on as few tokens as here, one or two for each input, goes further from the weight.
SCALES = {"gptq": ("--scaling", "none"), "awq": ()}  # with scales folded in, weights are others
NEAR = {4: 0.3, 8: 0.02}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, one whose head is not tied, rows, a text, and a 4-bit run with held-out rows."""
    return make_world(tmp_path_factory.mktemp("world"))


def test_a_run_on_its_own_rows(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(world / "run", tmp_path / "run")
    code, text, errors = export(capsys, "gptq", run, *SMALL, *SCALES["gptq"])
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
    manifest = manifest_of(place)
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
    # a correction moves the weights themselves, by what earlier layers lost
    code, text, errors = export(
        capsys, *words, "--format", container, "--correction", 0, *more, *SCALES[algorithm]
    )
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
    assert export(capsys, "verify", out)[0] == 0


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "mistral"])
def test_every_architecture(
    architecture: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_model(tmp_path / "base", architecture)
    tiny_tokenizer().save_pretrained(base)
    words = (*SMALL, "--calib-data", world / "text.txt", "--gate", "kl=1,ppl=3", "--out", tmp_path / "out")
    code, _, errors = export(capsys, "awq", base, *words, "--max-shard-size", "50KB")
    assert code == 0, errors
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert export(capsys, "verify", tmp_path / "out")[0] == 0


@pytest.mark.parametrize("native", [True, False])
def test_calibration_is_in_bfloat16_where_the_cpu_multiplies_in_it(
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    native: bool,
) -> None:
    monkeypatch.setattr("qtrain.export.layerwise.multiplies_bf16", lambda _: native)
    options = (*SMALL, "--device", "cpu", "--calib-data", str(world / "text.txt"))
    found = []
    for more in ((), ("--dtype", "fp32")):
        out = tmp_path / f"out{len(found)}"
        code, _, errors = export(capsys, "gptq", world / "base", *options, *more, "--out", out)
        assert code == 0, errors
        found.append(manifest_of(out))
    assert [its["compute"]["dtype"] for its in found] == ["bfloat16" if native else "float32", "float32"]
    short, exact = (sum(its["errors"].values()) for its in found)
    assert short == exact or 0.8 < short / exact < 1.25  # another rounding of the same inputs


def test_a_head_of_its_own(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (*SMALL, "--calib-data", world / "text.txt", "--lm-head", "--out", tmp_path / "out")
    code, _, errors = export(capsys, "gptq", world / "untied", *words)
    assert code == 0, errors
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["lm_head"]
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert "lm_head.qweight" in names
    assert "lm_head.weight" not in names
    assert 0 < manifest_of(tmp_path / "out")["errors"]["lm_head"] < 0.05
    assert export(capsys, "verify", tmp_path / "out")[0] == 0
    assert "tied to the embedding, which stays in 16 bits" in refused(
        capsys, "gptq", world / "base", *words[:-1], tmp_path / "other"
    )


def test_below_the_gate(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (world / "base", *SMALL, "--calib-data", world / "text.txt", "--out", tmp_path / "out")
    line = refused(capsys, "gptq", *words, "--gate", "kl=1e-6", code=1)
    assert "out.rejected is below the gate: KL 0." in line
    assert "is above 1e-06" in line
    assert [path.name for path in tmp_path.iterdir()] == ["out.rejected"]
    result = manifest_of(tmp_path / "out.rejected")["gate"]["result"]
    assert not result["passed"]
    assert result["bounds"]["kl"] == 1e-6
    assert "KL" in refused(capsys, "verify", tmp_path / "out.rejected", code=1)
    assert export(capsys, "verify", tmp_path / "out.rejected", "--gate", "kl=1")[0] == 0
    assert export(capsys, "gptq", *words, "--gate", "off")[0] == 0
    assert manifest_of(tmp_path / "out")["gate"]["result"]["bounds"] == "off"


KILLED = """
import os, signal, sys
from qtrain.cli import main
from qtrain.export_command.progress import ModuleProgress

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.journal", "killed.lock"]
    line = refused(capsys, *words, "--out", tmp_path / "killed")
    assert "holds an unfinished export; go on with it: --resume, or begin anew: --force" in line
    line = refused(capsys, *words, "--out", tmp_path / "killed", "--resume", "--damp", "0.1")
    assert "was begun differently" in line
    # again, with all layers done and the checkpoint half written
    died = _stopped("", "SIGKILL", *words, "--out", tmp_path / "killed", "--resume", code=LATER)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert "resumed: 1 of 2 layers are done already" in died.stdout
    assert "layer 1/2" not in died.stdout
    left = ["killed.journal", "killed.lock", "killed.partial"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    code, text, errors = export(capsys, *words, "--out", tmp_path / "killed", "--resume")
    assert code == 0, errors
    assert "resumed: 2 of 2 layers are done already" in text
    assert [path.name for path in tmp_path.iterdir()] == ["killed"]
    assert export(capsys, *words, "--out", tmp_path / "whole")[0] == 0
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
    code, text, errors = export(capsys, *words, "--dry-run")
    assert code == 0, errors
    assert not list(tmp_path.iterdir())
    for told in ("peak memory: about", "time: about", "nothing was written", "k_proj", "in 16 bits"):
        assert told in text
    assert export(capsys, *words)[0] == 0
    size = sum(tensor.nbytes for tensor in load_file(out / "model.safetensors").values())
    assert f"{size:,} bytes" in text


def test_rows_kept_back_are_not_calibrated_on(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"instruction": f"row {n}", "output": f"number {n}"} for n in range(40)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    words = (world / "base", "--group-size", "32", "--calib", "100", "--calib-length", "32")
    assert export(capsys, "gptq", *words, "--calib-data", data, "--out", tmp_path / "out")[0] == 0
    manifest = manifest_of(tmp_path / "out")
    assert manifest["calibration"]["rows_available"] == 36
    assert manifest["gate"]["rows"] == 4
    assert manifest["gate"]["held_out"]
    # nine rows are too few to keep one back
    few = write_rows(tmp_path / "few.jsonl", rows[:9])
    code, text, _ = export(capsys, "gptq", *words, "--calib-data", few, "--out", tmp_path / "few")
    assert code == 0
    assert "measured on rows that it was calibrated on" in text
    assert not manifest_of(tmp_path / "few")["gate"]["held_out"]
