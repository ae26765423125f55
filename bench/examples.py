"""A launch for a specimen, with inputs and the float64 result: what the emulator's tests and counters run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qtrain.kernels.specimens import Specimen

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Example:
    """kernel[grid](**arguments) writes `outputs`, which ought to be `expected` (float64)."""

    specimen: Specimen
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    expected: dict[str, Tensor]
    ideal_bytes: int
    options: dict[str, Any] = field(default_factory=dict)

    def emulate(self, *, racecheck: bool = False, edit: Callable[[str], str] | None = None) -> Any:
        """Run it on the emulator, in place; returns its Counters."""
        from .ptx import launch

        chosen = self.specimen
        return launch(
            chosen.kernel,
            self.grid,
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
            emu={"racecheck": racecheck},
            edit=edit,
            **self.arguments,
            **chosen.constexprs,
            **chosen.options,
        )


@dataclass(frozen=True, slots=True)
class Shape:
    """M rows, N outputs, K inputs."""

    rows: int
    outputs: int
    inner: int


def dtype_of(specimen: Specimen, argument: str) -> torch.dtype:
    """Of a pointer argument."""
    return DTYPES[specimen.signature[argument].removeprefix("*")]


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """An output that is NaN until it is written."""
    return torch.full(shape, torch.nan, dtype=dtype)


def nbytes(*tensors: Tensor) -> int:
    """What they hold."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
