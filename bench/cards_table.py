"""Cards as a table for the terminal or for the documents."""

from __future__ import annotations

from collections.abc import Mapping

from .budget import violations
from .cards import Card
from .sass import GLOBAL_ACCESSES, MMA, WARP_GROUP_MMA
from .table import Column, figure

COLUMNS = [
    Column("kernel", numeric=False),
    Column("sm"),
    Column("warps/stages"),
    Column("regs"),
    Column("spills"),
    Column("shared B"),
    Column("blocks/SM"),
    Column("MMA"),
    Column("other/MMA"),
    *(Column(name) for name in GLOBAL_ACCESSES),
    Column("main loop", numeric=False),
    Column("budget", numeric=False),
]

WIDTHS = "256, 128, 64, 32, 16 and 8 bits"


def cells(card: Card) -> list[str]:
    """One row; access widths read `128: 24, 32: 1`."""
    return [
        card.specimen,
        str(card.arch),
        f"{card.num_warps}/{card.num_stages}",
        str(card.registers),
        _spills(card),
        str(card.shared_bytes),
        f"{card.blocks_per_sm} ({card.occupancy:.0%})",
        str(card.mma + card.warp_group_mma),
        figure(card.other_per_mma, 2),
        *(_widths(card.accesses[name]) for name in GLOBAL_ACCESSES),
        _mix(card.main_loop),
        "; ".join(violations(card)) or f"{card.budget}: ok",
    ]


def _spills(card: Card) -> str:
    if not (card.stack_bytes or card.spill_stores or card.spill_loads):
        return "0"
    return f"{card.stack_bytes} B, {card.spill_stores} STL, {card.spill_loads} LDL"


def _widths(widths: Mapping[int, int]) -> str:
    return ", ".join(f"{count}x{bits}" for bits, count in sorted(widths.items(), reverse=True)) or "–"


def _mix(loop: Mapping[str, int] | None, top: int = 4) -> str:
    """The loop's length and its most frequent instructions beside the tensor cores'."""
    if loop is None:
        return "–"
    others = {name: count for name, count in loop.items() if name not in MMA | WARP_GROUP_MMA}
    most = sorted(others.items(), key=lambda item: -item[1])[:top]
    return f"{sum(loop.values())}: " + ", ".join(f"{name} {count}" for name, count in most)
