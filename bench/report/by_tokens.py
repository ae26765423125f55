"""Memory and time by the number of tokens: where a variant's grow with it, and where they do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ..results import AGAIN, MEMORY, Figure, Row
from .axes import Axis, from_zero, logarithmic
from .plots import Series, plot
from .source import Source, grouped, is_ours, main_of, times
from .text import quantity, scale

TOKENS = ("M", "T", "tokens")
LOG_FROM = 30  # times as much as the least: then the axis is logarithmic
HEIGHT, LABEL_ROOM = 210, 150


@dataclass(frozen=True, slots=True)
class What:
    """A quantity; `least` is what less is drawn as on a logarithmic axis."""

    of: Callable[[Row], Figure | None]
    unit: str
    axis: str
    verb: str
    best: str
    least: float


MEMORY_ADDED = What(
    lambda row: row.figures.get(MEMORY),
    "bytes",
    "added at the peak",
    "adds",
    "the most frugal",
    float(1 << 16),
)
TIME_TAKEN = What(times, "s", "of time", "takes", "the quickest", 1e-9)


@dataclass(frozen=True, slots=True)
class Growth:
    """One op at one width, over token counts."""

    title: str
    says: str
    picture: Markup


def memory(source: Source) -> list[Growth]:
    """What forward and backward add, of every case with two token counts; those that differ most first."""
    return [
        one
        for results in source.results
        for one in growths([row for row in results.rows if _is_whole(row, results.rows)], MEMORY_ADDED, 2)
    ]


def growths(rows: Sequence[Row], what: What, counts: int) -> list[Growth]:
    """Of every case with so many token counts; those in which ours differs most from the rest first."""
    found = [_growth(case, what) for case in _cases(rows, what, counts)]
    return [one for _, one in sorted(found, key=lambda pair: -pair[0])]


def tokens(row: Row) -> int:
    """The count of tokens in the row's shape; 0 where it has none."""
    return next((int(v) for name, v in row.shape if name in TOKENS and isinstance(v, int) and v > 0), 0)


def _cases(rows: Sequence[Row], what: What, counts: int) -> Iterator[list[Row]]:
    def key(row: Row) -> tuple[object, ...]:
        rest = tuple(pair for pair in row.shape if pair[0] not in TOKENS)
        return (row.op, row.phase, row.dtype, rest)

    for case in grouped((row for row in rows if tokens(row) and what.of(row) is not None), key):
        if len({tokens(row) for row in case}) >= counts:
            yield case


def _is_whole(row: Row, rows: Sequence[Row]) -> bool:
    """Forward and backward where an op has both: that is what a training step holds."""
    return "+" in row.phase or not any("+" in other.phase for other in rows if other.op == row.op)


def _growth(case: Sequence[Row], what: What) -> tuple[float, Growth]:
    """How many times ours the worst takes at the most tokens, and the picture."""
    ends = [end for row in case for end in (_drawn(_low(row, what), what), _drawn(_high(row, what), what))]
    divisor, unit = scale(what.unit, max(ends))
    shown = [end / divisor for end in ends]
    steep = max(shown) > LOG_FROM * min(shown)
    y: Axis = logarithmic(shown) if steep else from_zero(shown, 1.08)
    variants = grouped((row for row in case if not row.variant.endswith(AGAIN)), lambda row: row.variant)
    counts = sorted({tokens(row) for row in case})
    picture = plot(
        [_series(rows, what, divisor) for rows in variants],
        logarithmic(counts, 1.12),
        y,
        x_name="tokens",
        y_name=f"{unit} {what.axis}{', logarithmic' if steep else ''}",
        height=HEIGHT,
        x_ticks=_apart(counts),
        label_room=LABEL_ROOM,
    )
    last = [row for row in case if tokens(row) == counts[-1]]
    mine = main_of(last)
    most = max(_middle(row, what) for row in last)
    apart = most / max(_middle(mine, what), what.least) if mine is not None else 0.0
    return apart, Growth(_title(case[0]), _says(last, counts[-1], mine, what), picture)


def _title(row: Row) -> str:
    rest = [str(v) if isinstance(v, str) else f"{n} {v}" for n, v in row.shape if n not in TOKENS]
    return ", ".join([row.op, *rest, row.dtype, row.phase])


def _apart(counts: Sequence[int]) -> list[float]:
    """Those whose ticks can be read beside each other, the largest among them."""
    kept: list[float] = []
    for count in reversed(counts):
        if not kept or count * 1.6 <= kept[-1]:
            kept.append(float(count))
    return kept


def _figure(row: Row, what: What) -> Figure:
    figure = what.of(row)
    if figure is None:
        raise ValueError(f"{row.where} has no such figure")
    return figure


def _middle(row: Row, what: What) -> float:
    return _figure(row, what).p50


def _low(row: Row, what: What) -> float:
    return _figure(row, what).p05


def _high(row: Row, what: What) -> float:
    return _figure(row, what).p95


def _told(row: Row, what: What) -> str:
    return quantity(_middle(row, what), what.unit)


def _drawn(value: float, what: What) -> float:
    return max(value, what.least)


def _series(rows: Sequence[Row], what: What, divisor: float) -> Series:
    ordered = sorted(rows, key=tokens)
    name = ordered[0].variant
    several = any(_figure(row, what).n > 1 for row in ordered)
    return Series(
        name,
        [float(tokens(row)) for row in ordered],
        [_drawn(_middle(row, what), what) / divisor for row in ordered],
        [_drawn(_low(row, what), what) / divisor for row in ordered] if several else None,
        [_drawn(_high(row, what), what) / divisor for row in ordered] if several else None,
        ours=is_ours(ordered[0]),
        titles=[
            f"{name}, {tokens(row)} tokens: {quantity(_middle(row, what), what.unit)}" for row in ordered
        ],
    )


def _says(rows: Sequence[Row], count: int, mine: Row | None, what: What) -> str:
    others = [row for row in rows if not is_ours(row)]
    if mine is None or not others:
        return f"At {count} tokens."
    least = min(others, key=lambda row: _middle(row, what))
    ours, theirs = (quantity(_middle(row, what), what.unit) for row in (mine, least))
    return (
        f"At {count} tokens {mine.variant} {what.verb} {ours}, {what.best} other, {least.variant}, {theirs}."
    )
