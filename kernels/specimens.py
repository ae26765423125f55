"""Every Triton kernel in every configuration that a launcher can choose.

What is compiled ahead of time, held to `budget.toml` and run through the emulator is this list: a
configuration that a launcher can choose and that is not here is a mistake, and a test says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Specimen:
    """One kernel as one launch would specialise it.

    `signature` gives each argument's Triton type ("*bf16", "i32", "fp32", "constexpr"), `aligned` the
    arguments that a launch sees as divisible by 16, `hot` the pointers whose global accesses must be
    128 bits wide, `budget` the entry of `budget.toml` that the compiled code is held to.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    aligned: frozenset[str]
    num_warps: int
    num_stages: int
    budget: str
    hot: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


def all_specimens() -> list[Specimen]:
    """Of all ops. Needs triton."""
    from . import logprob_specimens, lora_specimens, nf4_triton

    return [*nf4_triton.specimens(), *lora_specimens.specimens(), *logprob_specimens.specimens()]
