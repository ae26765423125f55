"""Checkpoints that are complete or absent: written aside, checksummed, renamed, and checked before use."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from qtrain.errors import UserError
from qtrain.runs.atomic import damage, write_checksums

_NAME = re.compile(r"checkpoint-(\d+)")
_PARTIAL = ".partial"


def checkpoint_step(folder: Path) -> int:
    """The optimizer step that a checkpoint folder was written after, or -1 for another folder."""
    match = _NAME.fullmatch(folder.name)
    return int(match.group(1)) if match else -1


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete or damaged checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if checkpoint_step(path) >= 0), key=checkpoint_step)


def partial_parent(folder: Path) -> Path:
    """Where the next checkpoint is written before it gets its name."""
    return folder / _PARTIAL


def begin(folder: Path) -> Path:
    """Clear what a killed process left half-written and return the folder to write in."""
    parent = partial_parent(folder)
    shutil.rmtree(parent, ignore_errors=True)
    parent.mkdir(parents=True)
    return parent


def commit(folder: Path, step: int, keep: int) -> Path:
    """Checksum the written checkpoint, give it its name, and remove all but the newest `keep`."""
    written = partial_parent(folder) / f"checkpoint-{step}"
    final = folder / f"checkpoint-{step}"
    (written / "README.md").unlink(missing_ok=True)  # peft's unfilled model card
    write_checksums(written)
    if final.exists():  # a damaged one of the same step, from before a resume
        shutil.rmtree(final)
    written.replace(final)
    shutil.rmtree(partial_parent(folder))
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def latest_complete(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest undamaged checkpoint; every damaged one that is passed over is named to `say`.

    Raises:
        UserError: there are checkpoints and all of them are damaged.
    """
    found = list_checkpoints(folder)
    faults = []
    for checkpoint in reversed(found):
        fault = damage(checkpoint)
        if fault is None:
            return checkpoint
        say(f"{checkpoint.name} is damaged and passed over: {fault}")
        faults.append(fault)
    if faults:
        raise UserError(
            f"no checkpoint in {folder} is complete ({'; '.join(faults)}); start anew with another --out, "
            f"or remove {folder.parent}"
        )
    return None
