"""What is compared in the training benchmark: which library, set up how, under which name."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .peers.environments import find_peer

TASKS = ("dpo", "sft", "sft-answers")
BASELINE = "TRL (default)"
OURS = "qtrain"
AGAIN = "qtrain (again)"  # the A/A run: the same variant under another name


@dataclass(frozen=True, slots=True)
class Variant:
    """One row of the table."""

    name: str
    worker: str  # ours, trl, unsloth
    dtype: str = "bf16"
    options: dict[str, Any] = field(default_factory=dict)

    def python(self, cache: Path) -> Path:
        """The interpreter of its environment."""
        return Path(sys.executable) if self.worker == "ours" else find_peer(self.worker, cache).python

    def missing(self, cache: Path) -> str | None:
        """Why it can't run here, or None."""
        return None if self.worker == "ours" else find_peer(self.worker, cache).missing()


ON, OFF = {"checkpointing": True}, {"checkpointing": False}

_DPO = (
    Variant(BASELINE, "trl", options=ON),
    Variant("TRL (best: precomputed reference, no checkpointing)", "trl", options=OFF | {"precompute": True}),
    Variant("TRL (fp32)", "trl", "fp32", ON),
    Variant("unsloth (default)", "unsloth", options=ON),
    Variant(
        "unsloth (best: precomputed reference, no checkpointing)",
        "unsloth",
        options=OFF | {"precompute": True},
    ),
    Variant("unsloth (fp32)", "unsloth", "fp32", ON),
    Variant(OURS, "ours", options=OFF),
    Variant("qtrain (checkpointing)", "ours", options=ON),
    Variant("qtrain (prompts not shared)", "ours", options=OFF | {"share": False}),
    Variant("qtrain (dropout off, as the peers)", "ours", options=OFF | {"dropout": False}),
    Variant("qtrain (fp32)", "ours", "fp32", OFF),
    Variant(AGAIN, "ours", options=OFF),
)

_SFT = (
    Variant(BASELINE, "trl", options=ON),
    Variant("TRL (no checkpointing)", "trl", options=OFF),
    Variant("TRL (fp32)", "trl", "fp32", ON),
    Variant("unsloth (default)", "unsloth", options=ON),
    Variant("unsloth (no checkpointing)", "unsloth", options=OFF),
    Variant("unsloth (fp32)", "unsloth", "fp32", ON),
    Variant(OURS, "ours", options=OFF),
    Variant("qtrain (checkpointing)", "ours", options=ON),
    Variant("qtrain (fp32)", "ours", "fp32", OFF),
    Variant(AGAIN, "ours", options=OFF),
)


def variants(task: str) -> tuple[Variant, ...]:
    """The rows of a task's table.

    Raises:
        KeyError: no such task.
    """
    return {"dpo": _DPO, "sft": _SFT, "sft-answers": _SFT}[task]
