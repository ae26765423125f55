"""Every kernel against what the card could do: modelled from compiled code, or timed on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

from ..kernel_roofline import Rates, rates_of
from ..results import TIME, Results, Row
from ..statistics import median
from .axes import Axis, logarithmic
from .plots import LABEL_PX, Series, note, plot, roof
from .source import Source, grouped, is_ours
from .text import digits

MODELLED_FOR = "RTX 4090"  # what `cards_emulated` models
TERA = 1e12
HEIGHT = 420


@dataclass(frozen=True, slots=True)
class Point:
    """One kernel in one configuration."""

    name: str
    shape: str
    intensity: float
    low: float
    high: float
    share: str
    bound: str
    registers: str
    spills: str
    over_budget: str


@dataclass(slots=True)
class Roofline:
    """Of one card."""

    card: str
    says: str
    picture: Markup
    points: list[Point] = field(default_factory=list)
    left_out: str = ""


def rooflines(source: Source) -> list[Roofline]:
    """Modelled ones, then timed ones."""
    found = [_modelled(one) for one in source.results if one.kind == "cards"]
    found += [_timed(one) for one in source.results if one.kind == "kernels"]
    return [one for one in found if one is not None]


def _modelled(results: Results) -> Roofline | None:
    rates = rates_of(MODELLED_FOR)
    seen = [row for row in results.rows if row.details.get("emulated")]
    if rates is None or not seen:
        return None
    ordered = sorted(seen, key=lambda row: (row.flops or 0) / (row.ideal_bytes or 1))
    computing = [row for row in ordered if row.flops]
    says = (
        f"{len(computing)} configurations of kernels on the {rates.card}, none of them timed: what the "
        "emulator counted at small shapes, at the rates of the data sheet. A bar reaches from the speed if "
        "nothing overlaps to the speed if everything does."
    )
    moving = [row for row in ordered if not row.flops]
    left = ""
    if moving:
        names = ", ".join(dict.fromkeys(_kernel(row) for row in moving))
        least = min(_shares(row)[0] for row in moving)
        left = (
            f"Without products of matrices, so not in the plot: {names} ({len(moving)} in all), at "
            f"{least:.0%} or more of the bandwidth."
        )
    picture = _picture(computing, rates) if computing else Markup()
    return Roofline(rates.card, says, picture, [_point(row) for row in ordered], left)


def _kernel(row: Row) -> str:
    """`_input_grad_kernel` -> `input grad`."""
    return row.op.strip("_").removesuffix("_kernel").replace("_", " ")


def _shares(row: Row) -> tuple[float, float]:
    """Of the roofline: if nothing overlaps, if everything does."""
    seen = row.details["emulated"]
    return seen["roofline_us"] / seen["serial_us"], seen["roofline_us"] / seen["overlapped_us"]


def _speeds(row: Row) -> tuple[float, float]:
    """In TFLOP/s, likewise."""
    seen = row.details["emulated"]
    work = seen["flops"] * 1e6 / TERA
    return work / seen["serial_us"], work / seen["overlapped_us"]


def _point(row: Row) -> Point:
    card, seen, (low, high) = row.details, row.details["emulated"], _shares(row)
    return Point(
        row.variant,
        " × ".join(str(size) for size in seen["shape"].values()),
        (row.flops or 0.0) / (row.ideal_bytes or 1.0),
        *_speeds(row),
        f"{low:.0%}–{high:.0%}",
        seen["bound"],
        str(card["registers"]),
        str(card["spill_stores"] + card["spill_loads"]),
        "; ".join(card["over_budget"]),
    )


def _picture(rows: Sequence[Row], rates: Rates) -> Markup:
    series = []
    for group in grouped(rows, _kernel):
        low, high = zip(*(_speeds(row) for row in group), strict=True)
        titles = [
            f"{row.variant}: {a:.1f} to {b:.1f} TFLOP/s, bound by {row.details['emulated']['bound']}"
            for row, a, b in zip(group, low, high, strict=True)
        ]
        places = [(row.flops or 0.0) / (row.ideal_bytes or 1.0) for row in group]
        series.append(Series("", places, high, low, high, ours=True, titles=titles, line=False))
    x, y = _axes(series, rates)
    names = [f"{_kernel(group[0])} ({len(group)})" for group in grouped(rows, _kernel)]
    return _plot(series, x, y, rates, _hung(series, names, x, y))


def _hung(series: Sequence[Series], names: Sequence[str], x: Axis, y: Axis) -> str:
    """Each name below its last point, on a string; the farther to the left, the lower, so that none cross."""
    order = sorted(range(len(series)), key=lambda i: -series[i].x[-1])
    depth = max(HEIGHT * (1 - y.at(low) / 100) for one in series for low in (one.low or ())[-1:])
    parts = []
    for step, i in enumerate(order):
        one, place = series[i], depth + 10 + step * LABEL_PX * 1.15
        across, top = x.at(one.x[-1]), 100 - y.at((one.low or one.y)[-1])
        parts.append(
            f'<line class="string" x1="{across:.2f}%" x2="{across:.2f}%" y1="{top:.2f}%" y2="{place:.1f}"/>'
            f'<text class="label" x="{across:.2f}%" dx="4" y="{place:.1f}">{escape(names[i])}</text>'
        )
    return "".join(parts)


def _timed(results: Results) -> Roofline | None:
    given = results.protocol.get("rates")
    rows = [row for row in results.rows if row.roofline_share and TIME in row.figures and row.flops]
    if not isinstance(given, dict) or not rows:
        return None
    rates = Rates(**given)
    series = [_timed_point(row) for row in rows]
    x, y = _axes(series, rates)
    mine = sorted(row.roofline_share or 0 for row in rows if is_ours(row))
    says = f"{len(rows)} cases timed on the {rates.card}; bars are 5th to 95th percentiles."
    if mine:
        among = f"{mine[0]:.0%} to {mine[-1]:.0%}"
        says += f" qtrain's reach {among} of the roofline, {median([mine]):.0%} in the median."
    return Roofline(rates.card, says, _plot(series, x, y, rates, ""))


def _timed_point(row: Row) -> Series:
    time, flops = row.figures[TIME], row.flops or 0.0
    low, middle, high = (flops / seconds / TERA for seconds in (time.p95, time.p50, time.p05))
    title = f"{row.variant}, {row.where}: {middle:.1f} TFLOP/s, {row.roofline_share:.0%} of the roofline"
    place = flops / (row.ideal_bytes or 1.0)
    return Series("", [place], [middle], [low], [high], ours=is_ours(row), titles=[title], line=False)


def _axes(series: Sequence[Series], rates: Rates) -> tuple[Axis, Axis]:
    ridge = rates.half / rates.memory
    speeds = [max(speed, 1e-3) for one in series for speed in (*(one.low or ()), *one.y)]
    return (
        logarithmic([*(place for one in series for place in one.x), ridge / 2, ridge * 2], 1.3),
        logarithmic([*speeds, rates.half / TERA], 1.6),
    )


def _plot(series: Sequence[Series], x: Axis, y: Axis, rates: Rates, labels: str) -> Markup:
    top, slope = rates.half / TERA, rates.memory / TERA
    start = max(x.low, y.low / slope)
    back = roof(x, y, [(start, start * slope), (top / slope, top), (x.high, top)])
    back += note(x, y, (x.high, top), f"{digits(top)} TFLOP/s, 16-bit products", anchor="end", lift=-7)
    corner = (start * slope * top) ** 0.5
    back += note(x, y, (corner / slope, corner), f"{rates.memory / 1e9:.0f} GB/s ", anchor="end", lift=-8)
    return plot(
        series, x, y, x_name="FLOP for each byte that has to move, logarithmic",
        y_name="TFLOP/s, logarithmic", height=HEIGHT, back=back + labels, label_room=110,
    )  # fmt: skip
