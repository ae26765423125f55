"""Peak memory by the number of tokens: where a variant's grows with it, and where it does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ..results import MEMORY, Row
from .axes import Axis, from_zero, logarithmic
from .plots import Series, plot
from .source import Source, grouped, is_ours, main_of
from .text import quantity, scale

TOKENS = ("M", "T", "tokens")
LEAST_COUNTS = 2
LEAST = float(1 << 16)  # bytes
LOG_FROM = 30  # times as much as the least: then the axis is logarithmic
SHOWN = 4


@dataclass(frozen=True, slots=True)
class Growth:
    """One op at one width, over token counts."""

    title: str
    says: str
    picture: Markup


def growths(source: Source) -> list[Growth]:
    """Of every case with more than one token count; those that differ most first."""
    found = [(spread, one) for case in _cases(source) for spread, one in [_growth(case)]]
    return [one for _, one in sorted(found, key=lambda pair: -pair[0])]


def tokens(row: Row) -> int | None:
    """The count of tokens in the row's shape."""
    return next((int(v) for name, v in row.shape if name in TOKENS and isinstance(v, int)), None)


def _cases(source: Source) -> Iterator[list[Row]]:
    def key(row: Row) -> tuple[object, ...]:
        rest = tuple(pair for pair in row.shape if pair[0] not in TOKENS)
        return (row.op, row.phase, row.dtype, rest)

    for one in source.results:
        rows = [row for row in one.rows if MEMORY in row.figures and tokens(row)]
        for case in grouped(rows, key):
            if len({tokens(row) for row in case}) >= LEAST_COUNTS and _is_whole(case[0], rows):
                yield case


def _is_whole(row: Row, rows: Sequence[Row]) -> bool:
    """Forward and backward where an op has both: that is what a training step holds."""
    return "+" in row.phase or not any("+" in other.phase for other in rows if other.op == row.op)


def _growth(case: Sequence[Row]) -> tuple[float, Growth]:
    values = [_drawn(row) for row in case]
    divisor, unit = scale("bytes", max(values))
    counts = sorted({count for row in case if (count := tokens(row))})
    shown = [value / divisor for value in values]
    steep = max(shown) > LOG_FROM * min(shown)
    y: Axis = logarithmic(shown) if steep else from_zero(shown, 1.08)
    series = [
        _series(rows, divisor)
        for rows in grouped(case, lambda row: row.variant)
        if not rows[0].variant.endswith("(again)")
    ]
    row = case[0]
    rest = ", ".join(
        str(v) if isinstance(v, str) else f"{n} {v}" for n, v in row.shape if n not in TOKENS and v != ""
    )
    picture = plot(
        series,
        logarithmic(counts, 1.12),
        y,
        x_name="tokens",
        y_name=f"{unit} added at the peak{', logarithmic' if steep else ''}",
        height=210,
        x_ticks=counts,
        label_room=150,
    )
    last = [r for r in case if tokens(r) == counts[-1]]
    most = max(r.figures[MEMORY].p50 for r in last)
    mine = main_of(last)
    return (most / max(mine.figures[MEMORY].p50, 1.0) if mine else 0.0), Growth(
        f"{row.op}, {rest}, {row.dtype}, {row.phase}", _says(last, counts[-1], mine), picture
    )


def _drawn(row: Row) -> float:
    """A process grows by pages: that is what less than a few of them is drawn as on a logarithmic axis."""
    return max(row.figures[MEMORY].p50, LEAST)


def _series(rows: Sequence[Row], divisor: float) -> Series:
    ordered = sorted(rows, key=lambda row: tokens(row) or 0)
    name = ordered[0].variant
    return Series(
        name,
        [float(tokens(row) or 0) for row in ordered],
        [_drawn(row) / divisor for row in ordered],
        ours=is_ours(ordered[0]),
        titles=[f"{name}, {tokens(r)} tokens: {quantity(r.figures[MEMORY].p50, 'bytes')}" for r in ordered],
    )


def _says(rows: Sequence[Row], count: int, mine: Row | None) -> str:
    others = [row for row in rows if not is_ours(row)]
    if mine is None or not others:
        return f"At {count} tokens."
    least = min(others, key=lambda row: row.figures[MEMORY].p50)
    return (
        f"At {count} tokens {mine.variant} adds {quantity(mine.figures[MEMORY].p50, 'bytes')}, the most "
        f"frugal other, {least.variant}, {quantity(least.figures[MEMORY].p50, 'bytes')}."
    )
