"""`python -m qtrain.bench layer`: modelled time of a LoRA layer's linears on an RTX 4090, by design.

A model, nothing timed: tensor-core time at the data sheet's rate, bytes at its bandwidth, added up with no
overlap between kernels. What the designs differ in is passes over [M, N] and [M, K] tensors and how often the
weight is decoded, so that is what is counted. `docs/kernels.md` explains the terms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console

from .table import Column, markdown_table, terminal_table

FLOPS = 165.2e12  # dense bf16 with fp32 accumulation, RTX 4090
BANDWIDTH = 1008e9  # bytes / s
MULTIPROCESSORS, CLOCK = 128, 2.52e9
NF4_BYTES = 4.127 / 8  # a weight, nested absmax included
RANK = 64
FLOPS_OF_MMA = 16 * 8 * 16 * 2
# other instructions per HMMA in the main loop, from `qtrain bench cards --arch 89`
DECODE_PER_MMA = 3.4

# Qwen2.5-7B: (name, N, K); q, k and v share their input, and so do gate and up
QWEN_7B = (
    ("q", 3584, 3584),
    ("k", 512, 3584),
    ("v", 512, 3584),
    ("o", 3584, 3584),
    ("gate", 18944, 3584),
    ("up", 18944, 3584),
    ("down", 3584, 18944),
)


@dataclass(frozen=True, slots=True)
class Design:
    """Bytes per element of output and of input beside the base product's own, and weight decodes."""

    name: str
    forward_out: float  # bytes / element of [M, N], the product's own 2 not counted
    forward_in: float  # bytes / element of [M, K]: further reads of x
    backward_out: float  # bytes / element of [M, N]: further reads of dy
    backward_in: float  # bytes / element of [M, K]: further passes over dx and x
    decodes_to_memory_above: int  # rows from which a bf16 copy of the weight is written, in each direction


DESIGNS = (
    # clone 4, B product 2, scale 4, add 6; x for A; dy twice more; dx: product 2, add 6, x for dA
    Design("PEFT+bnb", 16, 2, 4, 10, 0),
    # addmm_ into the output 4; x for A; dy.B twice and dy^T; dx addmm_ 4, x for dA
    Design("Unsloth", 4, 2, 6, 6, 0),
    # x for A; dy for dy.B and for dB; x for dA
    Design("qtrain", 0, 2, 4, 2, 4096),
)


def tensor_seconds(rows: int) -> float:
    """Forward and backward base products of one layer at the tensor cores' rate (dW is not needed)."""
    return sum(2 * 2 * rows * n * k for _, n, k in QWEN_7B) / FLOPS


def extra_seconds(design: Design, rows: int) -> float:
    """What the design adds to that, forward and backward."""
    moved = 0.0
    for _, n, k in QWEN_7B:
        moved += rows * n * (design.forward_out + design.backward_out)
        moved += rows * k * (design.forward_in + design.backward_in)
        if rows > design.decodes_to_memory_above:
            moved += 2 * n * k * (NF4_BYTES + 2)  # written; the product's read of it is its own
    thin = sum(2 * rows * RANK * (n + k) * 3 for _, n, k in QWEN_7B) / FLOPS
    return moved / BANDWIDTH + thin


def issue_share() -> float:
    """Share of the issue slots that a fused main loop takes while the tensor cores are busy."""
    products = FLOPS / FLOPS_OF_MMA / MULTIPROCESSORS / CLOCK  # HMMA a clock and multiprocessor
    return products * (1 + DECODE_PER_MMA) / 4


COLUMNS = (Column("M"), Column("base ms"), *(Column(f"{design.name} +ms") for design in DESIGNS))


def layer(
    rows: Annotated[list[int] | None, typer.Option(help="Tokens; repeatable.")] = None,
    markdown: Annotated[bool, typer.Option(help="As a Markdown table.")] = False,
) -> None:
    """Model the LoRA'd linears of a Qwen2.5-7B layer on an RTX 4090; nothing is timed."""
    lines = []
    for count in rows or [512, 1024, 2048, 4096, 8192]:
        base = tensor_seconds(count)
        cells = [str(count), f"{base * 1e3:.2f}"]
        for design in DESIGNS:
            extra = extra_seconds(design, count)
            cells.append(f"{extra * 1e3:.2f} ({extra / base:.0%})")
        lines.append(cells)
    if markdown:
        typer.echo(markdown_table(COLUMNS, lines))
        return
    console = Console()
    console.print(terminal_table("One layer of Qwen2.5-7B, r=64 on every linear: a model", COLUMNS, lines))
    share = issue_share()
    console.print(f"a fused main loop takes {share:.0%} of the issue slots while the tensor cores are busy")
