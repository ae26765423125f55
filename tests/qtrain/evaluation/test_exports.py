"""`qtrain eval` and `compare` of exports: their own weights, unpacked. Nothing trains on packed ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner

from qtrain.cli import app, main
from qtrain.evaluation.subject import find_subjects
from qtrain.export.checkpoint import Checkpoint
from qtrain.export.quantized_checkpoint import QuantizedCheckpoint
from tests.qtrain.export_command.exports import SMALL, make_world

FORMATS = {
    "gptq": ("gptq",),
    "awq": ("awq",),
    "compressed": ("gptq", "--format", "compressed-tensors"),
    "untied": ("awq",),
}
LIMITS = ("--max-new-tokens", "12", "--json")


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The error line of a command that must be refused."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert ended.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`make_world`'s base, rows and run; the merged run, and packed models of each kind."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    assert run("export", "merge", folder / "run", "--rows", "0").exit_code == 0
    for name, (algorithm, *further) in FORMATS.items():
        model = folder / ("untied" if name == "untied" else "base")
        words = ["export", algorithm, model, *further, *SMALL, "--calib-data", folder / "text.txt"]
        result = run(*words, "--rows", "0", "--gate", "off", "--out", folder / f"packed-{name}")
        assert result.exit_code == 0, result.output
    return folder


def unpacked_by_hand(packed: Path, model: Path, folder: Path) -> Path:
    """A plain folder with the values that the packed one stands for."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    weights = QuantizedCheckpoint.open(packed)
    names = Checkpoint.open(model).specs
    tensors = {name: weights.weight(name).clone() for name in names}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", FORMATS)
def test_a_packed_model_is_evaluated_with_the_values_it_stands_for(
    name: str, world: Path, tmp_path: Path
) -> None:
    packed, model = world / f"packed-{name}", world / ("untied" if name == "untied" else "base")
    plain = unpacked_by_hand(packed, model, tmp_path / "plain")
    found = []
    for folder in (packed, plain):
        result = run("eval", folder, "--data", world / "held-out.jsonl", *LIMITS)
        assert result.exit_code == 0, result.output
        [subject] = json.loads(result.stdout)["subjects"]
        found.append(subject)
    assert found[0]["rows"] == found[1]["rows"]
    assert [its["weights"] for its in found] == [
        {"compressed": "compressed-tensors", "gptq": "GPTQ"}.get(name, "AWQ"),
        "16-bit",
    ]


def test_exports_are_compared_with_their_own_weights(world: Path) -> None:
    merged, packed = world / "run" / "export" / "merged", world / "packed-gptq"
    names = [str(world / "run"), str(world / "base"), str(merged), str(packed)]
    assert [its.weights for its in find_subjects(names)] == ["nf4", "nf4", "16-bit", "GPTQ"]
    result = run("compare", *names, "--data", world / "held-out.jsonl", *LIMITS)
    assert result.exit_code == 0, result.output
    notes = json.loads(result.stdout)["notes"]
    assert f"{merged}, {packed}: with their own weights and the prompts of the runs" in notes
    assert any(note.startswith("the weights are held differently") for note in notes)


@pytest.mark.parametrize("options", [("--4bit",), (), ("--4bit", "--dry-run")])
def test_nothing_trains_on_packed_weights(
    options: tuple[str, ...], world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", *options, "--model", world / "packed-awq", "--data", world / "train.jsonl"]
    line = refused(capsys, *words, "--out", tmp_path / "v1")
    assert "are packed (AWQ), and training needs 16-bit ones; give the model that it was made of" in line
    assert list(tmp_path.iterdir()) == []


def test_a_packed_model_that_is_damaged_is_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = shutil.copytree(world / "packed-gptq", tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"no weights")
    line = refused(capsys, "eval", damaged, "--data", world / "held-out.jsonl")
    assert "model.safetensors is damaged or no safetensors file" in line
