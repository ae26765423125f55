"""What the tests of quantised exports share: a small world, and the command line as a user calls it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qtrain.cli import main
from qtrain.runs.manifest import base_hashes
from qtrain.runs.rundir import RunDir
from tests.export.folders import change_tensors
from tests.qtrain.tiny import save_tiny_base, save_tiny_run, write_rows

SIZES = {"hidden_size": 64, "intermediate_size": 128}  # groups of 32 and 64 fit
SMALL = ("--group-size", "32", "--calib", "6", "--calib-length", "32")


def make_world(folder: Path) -> Path:
    """A base, one whose head is not tied, rows, a text, and a 4-bit run with held-out rows."""
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


def damaged_base(world: Path, place: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of the world's base whose tensors `change` has changed."""
    return change_tensors(shutil.copytree(world / "base", place), change)


def export(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of `qtrain export`."""
    with pytest.raises(SystemExit) as ended:
        main(["export", *map(str, words)])
    captured = capsys.readouterr()
    code = ended.value.code
    return (code if isinstance(code, int) else 0), captured.out, captured.err


def refused(capsys: pytest.CaptureFixture[str], *words: object, code: int = 2) -> str:
    """The one line of an export that must fail."""
    found, _, text = export(capsys, *words)
    assert found == code, text
    lines = [line for line in text.splitlines() if not line.startswith(("Loading", "Writing"))]
    assert len(lines) == 1, text
    assert lines[0].startswith("error: ")
    return lines[0]


def manifest_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found
