"""SVG of the page's plots: lines, points with intervals, and the interval in a table's cell.

Coordinates across are per cent, so that text and dots keep their size whatever the width of the screen;
colours are the page's CSS variables, by class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

from .axes import Axis, spread
from .text import tick as _tick

LABEL_PX = 14  # the height of a line of text
LABEL_WIDTH = 22.0  # per cent of a plot's width: points nearer than that share a column of names


@dataclass(frozen=True, slots=True)
class Series:
    """A line, or points alone; `low` and `high` are the ends of each point's interval."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    ours: bool = False
    titles: Sequence[str] | None = None
    line: bool = True
    faint: bool = False
    left: bool = False
    """Named on its left."""


def interval_cell(axis: Axis, low: float, middle: float, high: float, *, ours: bool, title: str) -> Markup:
    """Of one row in a table: the interval as a bar, the median as a dot, grid lines at the axis' ticks."""
    grid = "".join(
        f'<line class="grid" x1="{_at(axis, t)}" x2="{_at(axis, t)}" y2="100%"/>' for t in axis.ticks(4)
    )
    start, end = axis.at(low), axis.at(high)
    kind = "ours" if ours else "other"
    return Markup(
        f'<svg class="cell {kind}" role="img"><title>{escape(title)}</title>{grid}'
        f'<rect x="{start:.2f}%" y="50%" width="{max(end - start, 0.4):.2f}%" height="7" '
        f'transform="translate(0 -3.5)"/><circle cx="{_at(axis, middle)}" cy="50%" r="3.5"/></svg>'
    )


def axis_cell(axis: Axis) -> Markup:
    """The ticks' values, for the head of such a column."""
    texts = "".join(
        f'<text x="{_at(axis, tick)}" y="11" text-anchor="{_anchor(axis.at(tick))}">{_tick(tick)}</text>'
        for tick in axis.ticks(4)
    )
    return Markup(f'<svg class="ticks" aria-hidden="true">{texts}</svg>')


def plot(
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    *,
    x_name: str,
    y_name: str,
    height: int = 260,
    x_ticks: Sequence[float] | None = None,
    back: str = "",
    label_room: int = 0,
    kind: str = "",
) -> Markup:
    """Series in one box, each named at its right end; `back` is SVG that lies behind them."""
    frame = _frame(x, y, x_ticks or x.ticks(6), height)
    drawn = "".join(_series(one, x, y) for one in sorted(series, key=lambda one: one.ours))
    labels = _end_labels(series, x, y, height)
    return Markup(
        f'<figure class="plot {kind}" style="--room:{label_room}px"><figcaption>{escape(y_name)}</figcaption>'
        f'<div class="box" style="height:{height}px">'
        f'<svg role="img" aria-label="{escape(y_name)} by {escape(x_name)}">'
        f'{frame}{back}{drawn}{labels}</svg></div><p class="xname">{escape(x_name)}</p></figure>'
    )


def roof(x: Axis, y: Axis, corners: Sequence[tuple[float, float]]) -> str:
    """A line through corners, without points."""
    return "".join(
        f'<line class="roof" x1="{_at(x, a)}" y1="{_down(y, b)}" x2="{_at(x, c)}" y2="{_down(y, d)}"/>'
        for (a, b), (c, d) in pairwise(corners)
    )


def note(
    x: Axis, y: Axis, place: tuple[float, float], words: str, *, anchor: str = "start", lift: int = -6
) -> str:
    """Text in the box, `lift` pixels below (above: negative) its place."""
    return (
        f'<text class="note" x="{_at(x, place[0])}" y="{_down(y, place[1])}" dy="{lift}" '
        f'text-anchor="{anchor}">{escape(words)}</text>'
    )


def _frame(x: Axis, y: Axis, x_ticks: Sequence[float], height: int) -> str:
    parts = []
    for tick in y.ticks(max(3, height // 50)):
        place = _down(y, tick)
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{place}" y2="{place}"/>')
        parts.append(f'<text x="-6" y="{place}" dy="4" text-anchor="end">{_tick(tick)}</text>')
    for tick in x_ticks:
        place = _at(x, tick)
        parts.append(f'<line class="tick" x1="{place}" x2="{place}" y1="100%" y2="100%"/>')
        parts.append(f'<text x="{place}" y="100%" dy="16" text-anchor="middle">{_tick(tick)}</text>')
    parts.append('<line class="axis" x1="0" x2="100%" y1="100%" y2="100%"/>')
    return "".join(parts)


def _series(one: Series, x: Axis, y: Axis) -> str:
    kind = "ours" if one.ours else "other"
    kind += " faint" if one.faint else ""
    points = list(zip(one.x, one.y, strict=True))
    parts = [f'<g class="{kind}">']
    if one.line:
        parts += [
            f'<line x1="{_at(x, a)}" y1="{_down(y, b)}" x2="{_at(x, c)}" y2="{_down(y, d)}"/>'
            for (a, b), (c, d) in pairwise(points)
        ]
    for i, (a, b) in enumerate(points):
        if one.low is not None and one.high is not None:
            parts.append(
                f'<line class="bar" x1="{_at(x, a)}" x2="{_at(x, a)}" '
                f'y1="{_down(y, one.low[i])}" y2="{_down(y, one.high[i])}"/>'
            )
        if one.titles is not None:
            parts.append(
                f'<circle cx="{_at(x, a)}" cy="{_down(y, b)}" r="3.5">'
                f"<title>{escape(one.titles[i])}</title></circle>"
            )
    return "".join([*parts, "</g>"])


def _end_labels(series: Sequence[Series], x: Axis, y: Axis, height: int) -> str:
    """Names beside the last points; those that stand above each other are moved apart."""
    named = sorted((one for one in series if one.name), key=lambda one: (one.left, one.x[-1]))
    columns: list[list[Series]] = []
    for one in named:
        last = columns[-1][-1] if columns else None
        if last is not None and last.left == one.left and x.at(one.x[-1]) - x.at(last.x[-1]) < LABEL_WIDTH:
            columns[-1].append(one)
        else:
            columns.append([one])
    return "".join(_column_of_labels(column, x, y, height) for column in columns)


def _column_of_labels(named: Sequence[Series], x: Axis, y: Axis, height: int) -> str:
    ends = [height * (1 - y.at(one.y[-1]) / 100) for one in named]
    places = spread(ends, LABEL_PX, 6, height - 4)
    parts = []
    for one, place in zip(named, places, strict=True):
        beside = 'dx="-9" text-anchor="end"' if one.left else 'dx="9"'
        parts.append(
            f'<text class="label {"ours" if one.ours else ""}" x="{_at(x, one.x[-1])}" y="{place:.1f}" '
            f'dy="4" {beside}>{escape(one.name)}</text>'
        )
    return "".join(parts)


def _at(axis: Axis, value: float) -> str:
    return f"{axis.at(value):.2f}%"


def _down(axis: Axis, value: float) -> str:
    return f"{100 - axis.at(value):.2f}%"


def _anchor(place: float) -> str:
    return "start" if place < 3 else "end" if place > 94 else "middle"
