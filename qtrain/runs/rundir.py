"""The run directory: names of what is in it, and its state."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtrain.errors import UserError

from .atomic import write_json


@dataclass(frozen=True, slots=True)
class RunDir:
    """The folder of one run: its recipe, manifest and status, adapter, checkpoints and metrics."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe, every default written out."""
        return self.path / "recipe.yaml"

    @property
    def manifest(self) -> Path:
        """Versions, hashes, device, choices and their reasons."""
        return self.path / "manifest.json"

    @property
    def status_file(self) -> Path:
        """Where the run stands."""
        return self.path / "status.json"

    @property
    def adapter(self) -> Path:
        """The final adapter in PEFT's format."""
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        """checkpoint-N folders."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One line a logged step."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.path / "tensorboard"

    @property
    def bad_rows(self) -> Path:
        """Rows left out by data.skip_bad_rows."""
        return self.path / "bad_rows.jsonl"

    @property
    def bad_held_out_rows(self) -> Path:
        """Held-out rows left out by data.skip_bad_rows."""
        return self.path / "bad_rows_eval.jsonl"

    @property
    def reference(self) -> Path:
        """The reference's log-probs of a DPO run."""
        return self.path / "reference_logps.npy"

    def exists(self) -> bool:
        """Whether a run was begun here."""
        return self.recipe.is_file()

    def status(self) -> dict[str, Any]:
        """state (running, stopped, failed, finished), step, final figures; empty before the first step."""
        try:
            value = json.loads(self.status_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise UserError(
                f"{self.status_file} can't be read: {error}; remove it and resume the run"
            ) from error
        return value if isinstance(value, dict) else {}

    def set_status(self, state: str, **figures: Any) -> None:
        """Record where the run stands."""
        write_json(self.status_file, {"state": state, **figures})


def open_run(path: Path) -> RunDir:
    """An existing run directory.

    Raises:
        UserError: nothing was run there.
    """
    run = RunDir(path)
    if not run.exists():
        raise UserError(f"{path} is not a run directory (it has no recipe.yaml); qtrain runs lists them")
    return run


def finished_run(path: Path) -> RunDir:
    """A run whose adapter is complete.

    Raises:
        UserError: it is not finished.
    """
    run = open_run(path)
    state = run.status().get("state", "not started")
    if state != "finished":
        raise UserError(f"{path} is {state}, not finished; go on with: qtrain run --resume --out {path}")
    return run
