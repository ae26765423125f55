"""Cards as a table for the terminal or for the documents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .budget import violations
from .cards import Card
from .sass import GLOBAL_ACCESSES, MMA, WARP_GROUP_MMA
from .table import Column, figure

if TYPE_CHECKING:
    from .cards_emulated import Emulated

COLUMNS = [
    Column("kernel", numeric=False),
    Column("sm"),
    Column("warps"),
    Column("stages"),
    Column("regs"),
    Column("spills"),
    Column("shared KB"),
    Column("blocks/SM"),
    Column("MMA"),
    Column("other/MMA"),
    *(Column(name) for name in GLOBAL_ACCESSES),
    Column("main loop", numeric=False),
    Column("budget", numeric=False),
]

EMULATED_COLUMNS = [
    Column("kernel", numeric=False),
    Column("M x N x K"),
    Column("bytes/ideal"),
    Column("L2/ideal"),
    Column("bank conflicts"),
    Column("model us"),
    Column("bound by", numeric=False),
    Column("of roofline"),
]


def emulated_cells(name: str, seen: Emulated) -> list[str]:
    """One row: ratios to the bytes that have to move; modelled times if all overlaps, and if nothing."""
    low, high = seen.of_roofline
    return [
        name,
        " x ".join(str(size) for size in seen.shape.values()),
        figure(seen.touched, 2),
        figure(seen.moved, 2),
        f"x{seen.conflicts:.2f}",
        f"{seen.overlapped_us:.1f}-{seen.serial_us:.1f}",
        seen.bound,
        f"{low:.0%}-{high:.0%}",
    ]


def line(card: Card) -> str:
    """The figures that matter most, for a terminal too narrow for the table."""
    ratio = "" if card.other_per_mma is None else f", {card.other_per_mma:.2f} other/MMA"
    return (
        f"sm_{card.arch:<3} {card.registers:>3} regs, {_spills(card)} spills, {_kilobytes(card)} KB shared, "
        f"{card.blocks_per_sm}/SM ({card.occupancy:.0%}){ratio}, {_verdict(card)}"
    )


def cells(card: Card) -> list[str]:
    """One row; access widths read `24x128, 1x32`: instructions x bits."""
    return [
        card.specimen,
        str(card.arch),
        str(card.num_warps),
        str(card.num_stages),
        str(card.registers),
        _spills(card),
        _kilobytes(card),
        f"{card.blocks_per_sm} ({card.occupancy:.0%})",
        str(card.mma + card.warp_group_mma),
        figure(card.other_per_mma, 2),
        *(_widths(card.accesses[name]) for name in GLOBAL_ACCESSES),
        _mix(card.main_loop),
        _verdict(card),
    ]


def excesses(card: Card) -> list[str]:
    """What is over budget, a line each."""
    return [f"{card.specimen}, sm_{card.arch}: {line}" for line in violations(card)]


def _kilobytes(card: Card) -> str:
    return f"{card.shared_bytes / 1024:.1f}"


def _verdict(card: Card) -> str:
    return "over budget" if violations(card) else "ok"


def _spills(card: Card) -> str:
    if not (card.stack_bytes or card.spill_stores or card.spill_loads):
        return "0"
    return f"{card.spill_stores}+{card.spill_loads} ({card.stack_bytes} B)"


def _widths(widths: Mapping[int, int]) -> str:
    return ", ".join(f"{count}x{bits}" for bits, count in sorted(widths.items(), reverse=True)) or "–"


def _mix(loop: Mapping[str, int] | None, top: int = 4) -> str:
    """The loop's length and its most frequent instructions beside the tensor cores'."""
    if loop is None:
        return "–"
    others = {name: count for name, count in loop.items() if name not in MMA | WARP_GROUP_MMA}
    most = sorted(others.items(), key=lambda item: -item[1])[:top]
    return f"{sum(loop.values())}: " + ", ".join(f"{name} {count}" for name, count in most)
