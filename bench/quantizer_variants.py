"""What is compared in the quantizers' benchmark: which library, by which method, in which settings."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .peers.environments import find_peer

Peer = Literal["gptqmodel", "llmcompressor", "autoround"]
OURS = "quantize_ours"
GROUP_SIZES = (64, 32)


@dataclass(frozen=True, slots=True)
class Variant:
    """One row of the table for each group size.

    Attributes:
        name: unique.
        worker: the module of `workers` that runs it.
        symmetric: whether zero points are the middle everywhere; only alike rows are compared.
        options: for the worker, besides `group_size` and `symmetric`.
        peer: whose environment it runs in; None for this project's own.
    """

    name: str
    worker: str
    symmetric: bool
    options: dict[str, Any] = field(default_factory=dict)
    peer: Peer | None = None

    @property
    def ours(self) -> bool:
        """Whether it is this project's quantizer, and not the baseline that runs beside it."""
        return self.worker == OURS

    def python(self, cache: Path) -> Path:
        """The interpreter of its environment."""
        return Path(sys.executable) if self.peer is None else find_peer(self.peer, cache).python

    def missing(self, cache: Path) -> str | None:
        """Why it can't run here, or None."""
        return None if self.peer is None else find_peer(self.peer, cache).missing()


def _peer(name: str, peer: Peer, symmetric: bool, **options: Any) -> Variant:
    return Variant(name, f"quantize_{peer}", symmetric, options, peer)


# auto-round's own `light` recipe, but for the calibration that all share; its default takes 4 times as long.
_LIGHT = {"iterations": 50, "rate": 5e-3, "batch": 8}

VARIANTS = (
    Variant("qtrain gptq", OURS, True, {"method": "gptq"}),
    _peer("GPTQModel GPTQ", "gptqmodel", True, method="gptq"),
    _peer("llm-compressor GPTQ", "llmcompressor", True, method="gptq"),
    _peer("auto-round (light)", "autoround", True, method="signround", **_LIGHT),
    Variant("round to nearest, symmetric", "quantize_nearest", True),
    Variant("qtrain awq", OURS, False, {"method": "awq"}),
    _peer("GPTQModel AWQ", "gptqmodel", False, method="awq"),
    _peer("GPTQModel AWQ (8 windows)", "gptqmodel", False, method="awq", windows=8),  # all take half an hour
    _peer("llm-compressor AWQ", "llmcompressor", False, method="awq"),
    Variant("round to nearest, asymmetric", "quantize_nearest", False),
)
