"""A killed export goes on where it was, with the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qtrain.export.errors import ExportError
from qtrain.export.journal import LINES, Journal

ROOT = Path(__file__).parents[2]
KEY = {"bits": 4, "group_size": 64, "files": {"a": "0f"}}


def test_entries_come_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    journal = Journal(out, KEY)
    tensors = {
        "m.qweight": torch.arange(6, dtype=torch.int32).reshape(2, 3),
        "m.scales": torch.ones(3).half(),
    }
    journal.save("layer-0", tensors, {"loss": {"m": 0.25}})
    journal.save("layer-1", {"n": torch.zeros(2)})
    again = Journal(out, KEY, resume=True)
    assert again.names() == ["layer-0", "layer-1"]
    assert "layer-0" in again
    assert "layer-2" not in again
    assert again.notes("layer-0") == {"loss": {"m": 0.25}}
    assert torch.equal(again.load("layer-0")["m.qweight"], tensors["m.qweight"])
    assert again.tensor("layer-0", "m.scales").dtype == torch.float16
    assert set(again.specs("layer-0")) == set(tensors)
    again.drop("layer-0")
    again.drop("layer-7")
    assert Journal(out, KEY, resume=True).names() == ["layer-1"]
    again.remove()
    assert list(tmp_path.iterdir()) == []


def test_replacing_an_entry(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "out", KEY)
    journal.save("hidden", {"x": torch.zeros(2)}, {"layer": 0})
    journal.save("layer-0", {"x": torch.zeros(2)})
    journal.save("hidden", {"x": torch.ones(2)}, {"layer": 1})
    again = Journal(tmp_path / "out", KEY, resume=True)
    assert again.names() == ["layer-0", "hidden"]
    assert again.notes("hidden") == {"layer": 1}
    assert again.tensor("hidden", "x").tolist() == [1, 1]


def test_a_journal_is_not_run_over_or_mixed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    Journal(out, KEY).save("layer-0", {"x": torch.zeros(2)})
    with pytest.raises(ExportError, match=r"out.journal holds an unfinished export; .*--resume, .*--force"):
        Journal(out, KEY)
    with pytest.raises(
        ExportError,
        match=r"begun differently \(group_size 64 -> 128, seed None -> 1\); give the same options",
    ):
        Journal(out, KEY | {"group_size": 128, "seed": 1}, resume=True)
    assert Journal(out, KEY, resume=True).names() == ["layer-0"]
    assert Journal(out, KEY | {"seed": 1}, force=True).names() == []


def test_resume_without_a_journal_begins(tmp_path: Path) -> None:
    assert Journal(tmp_path / "deep" / "out", KEY, resume=True).names() == []


@pytest.mark.parametrize("fault", ["flip", "cut", "gone"])
def test_a_damaged_entry_is_done_again(tmp_path: Path, fault: str) -> None:
    out = tmp_path / "out"
    journal = Journal(out, KEY)
    for name in ("layer-0", "layer-1"):
        journal.save(name, {"x": torch.randn(64)})
    path = journal.folder / "layer-0.safetensors"
    content = bytearray(path.read_bytes())
    if fault == "gone":
        path.unlink()
    else:
        content[-3] ^= 1
        path.write_bytes(content[:-8] if fault == "cut" else content)
    again = Journal(out, KEY, resume=True)
    assert again.names() == ["layer-1"]
    assert again.dropped == ["layer-0"]


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_torn_line_is_no_entry(tmp_path: Path, cut: int) -> None:
    out = tmp_path / "out"
    journal = Journal(out, KEY)
    journal.save("layer-0", {"x": torch.zeros(2)})
    journal.save("layer-1", {"x": torch.ones(2)})
    lines = journal.folder / LINES
    lines.write_bytes(lines.read_bytes()[:-cut])
    again = Journal(out, KEY, resume=True)
    assert again.names() == (["layer-0", "layer-1"] if cut == 1 else ["layer-0"])  # 1: only the line break
    again.save("layer-2", {"x": torch.zeros(2)})
    assert Journal(out, KEY, resume=True).names()[-1] == "layer-2"


def test_a_torn_first_line_begins_anew(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "out", KEY)
    (journal.folder / LINES).write_bytes(b'{"key": {"bi')
    assert Journal(tmp_path / "out", KEY).names() == []


def test_killed_at_any_time(tmp_path: Path) -> None:
    """Killed over and over while it saves: what counts as finished is always whole and right."""
    code = """
import sys, torch
from pathlib import Path
from qtrain.export.journal import Journal
journal = Journal(Path(sys.argv[1]), {"seed": 0}, resume=True)
print("ready", flush=True)
for n in range(400):
    if f"layer-{n}" not in journal:
        journal.save(f"layer-{n}", {"x": torch.full((5000,), float(n))})
"""
    out = tmp_path / "out"
    done = 0
    for delay in (0.02, 0.12):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(out)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        journal = Journal(out, {"seed": 0}, resume=True)
        assert len(journal.names()) >= done
        assert journal.dropped == []
        done = len(journal.names())
        for n in range(done):
            assert torch.equal(journal.tensor(f"layer-{n}", "x"), torch.full((5000,), float(n)))
    assert 0 < done < 400
    assert json.loads((journal.folder / LINES).read_text().splitlines()[0]) == {"key": {"seed": 0}}
