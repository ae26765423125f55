"""The weights of base and adapter in one, computed tensor by tensor.

    W' = round(W + scaling B A)      W: the stored weight, or its NF4 round trip

in float64, block of rows by block of rows, rounded once to the dtype that is stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .errors import ExportError
from .lora import Adapter
from .nf4_base import NF4Settings, nf4_modules, nf4_round_trip
from .rounded import round_once
from .tensors import TensorSpec, all_finite, check_finite

BaseWeights = Literal["original", "dequantized"]
BLOCK = 2**19  # elements of a block of rows: 4 MiB in float64


class MergedWeights:
    """What a merged checkpoint's tensors are, and which of the base's files they leave as they were."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        adapter: Adapter | None,
        *,
        base: BaseWeights = "original",
        nf4: NF4Settings | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            checkpoint: the 16-bit (or fp32) base.
            adapter: to be merged; None for the base alone.
            base: `original`, or `dequantized`: the NF4 round trip of every linear layer that a 4-bit run
                holds so.
            nf4: of the run, for `dequantized`.
            dtype: of all floating-point tensors; None for the one that each is stored in.

        Raises:
            ExportError: the adapter is for another base, or for a head that is tied to the embedding.
        """
        self.checkpoint = checkpoint
        self.adapter = adapter
        self.base = base
        self.nf4 = nf4 or NF4Settings()
        self.dtype = dtype
        self._nf4_modules = frozenset(nf4_modules(checkpoint.folder) if base == "dequantized" else ())
        self._adapted = frozenset(adapter.shapes if adapter is not None else ())
        if adapter is not None:
            adapter.check_fits(checkpoint.specs, checkpoint.folder)

    @property
    def folder(self) -> Path:
        """The base's folder."""
        return self.checkpoint.folder

    @property
    def config(self) -> dict[str, Any]:
        """The base's config.json."""
        return self.checkpoint.config

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor as it will be stored."""
        return {name: self.spec(name) for name in self.checkpoint.specs}

    def load(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Merged tensors by name, in memory of their own: what reads a `Checkpoint` can read this instead."""
        return {name: self.weight(name) for name in names}

    def tensor(self, name: str) -> Tensor:
        """One merged tensor, in memory of its own."""
        return self.weight(name)

    def spec(self, name: str) -> TensorSpec:
        """A tensor as it will be stored."""
        stored = self.checkpoint.specs[name]
        if self.dtype is None or not stored.dtype.is_floating_point:
            return stored
        return TensorSpec(name, self.dtype, stored.shape)

    def changes(self, name: str) -> bool:
        """Whether a tensor will differ from the stored one in values or dtype."""
        module = _module(name)
        recomputed = module in self._adapted or module in self._nf4_modules
        return recomputed or self.spec(name) != self.checkpoint.specs[name]

    def touches(self, file: str) -> bool:
        """Whether any tensor of one of the base's files changes."""
        return any(self.changes(name) for name in self.checkpoint.names_in(file))

    def blocks(self, name: str, stored: Tensor) -> Iterator[Tensor]:
        """A tensor's values from the stored ones, in blocks of rows.

        Raises:
            ExportError: stored values that are no numbers, or values that the dtype can't hold.
        """
        check_finite(name, stored, self.checkpoint.folder / self.checkpoint.file_of[name])
        target = self.spec(name).dtype
        module = _module(name)
        weight = nf4_round_trip(stored, self.nf4) if module in self._nf4_modules else stored
        delta = None
        if self.adapter is not None and module in self._adapted:
            delta = self.adapter.delta(module).in_float64()
        for first, last in _row_blocks(weight):
            rows = weight[first:last] if weight.dim() else weight
            if delta is not None:
                block = round_once(delta.rows(first, last).add_(rows), target)
            else:
                block = rows.to(target)
            if block.dtype != stored.dtype or delta is not None:
                self._check_range(name, block)
            yield block

    def weight(self, name: str) -> Tensor:
        """A whole tensor as it will be stored, in memory of its own."""
        stored = self.checkpoint.mapped(name)
        out = torch.empty(stored.shape, dtype=self.spec(name).dtype)
        done = 0
        for block in self.blocks(name, stored):
            out.view(-1)[done : done + block.numel()] = block.reshape(-1)
            done += block.numel()
        return out

    def fetch(self, name: str) -> Tensor:
        """A tensor for computing with: one that merging leaves alone is mapped, not read."""
        return self.weight(name) if self.changes(name) else self.checkpoint.mapped(name)

    def _check_range(self, name: str, block: Tensor) -> None:
        if block.is_floating_point() and not all_finite(block):
            raise ExportError(
                f"{name}: merged values are beyond {str(block.dtype).removeprefix('torch.')}; "
                "use --dtype bf16 or fp32"
            )


def _module(name: str) -> str:
    """The module whose weight a tensor is; nothing for a bias or a norm's other parameters."""
    module, _, last = name.rpartition(".")
    return module if last == "weight" else ""


def _row_blocks(tensor: Tensor) -> Iterator[tuple[int, int]]:
    if not tensor.dim():
        yield 0, 1
        return
    rows = tensor.shape[0]
    step = max(1, BLOCK * rows // max(tensor.numel(), 1))
    for first in range(0, rows, step):
        yield first, min(first + step, rows)
