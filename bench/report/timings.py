"""Time and memory of the variants, a table with intervals for each case."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ..results import MEMORY, Figure, Results, Row
from ..statistics import Ratio
from .axes import Axis, from_zero
from .by_tokens import TIME_TAKEN, Growth, growths
from .plots import axis_cell, interval_cell
from .source import Source, grouped, is_ours, main_of, peers_of, ratio, times
from .text import listed, median_of, quantity, scale
from .text import ratio as ratio_text

CLOCKS = {"train": "CPU time of all threads; a batch's step and its share of the reference pass"}


@dataclass(frozen=True, slots=True)
class Line:
    """One variant of a case."""

    name: str
    ours: bool
    cell: Markup
    time: str
    seconds: float | None
    ratio: str
    memory: str
    peak: float | None
    status: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """One case: op, shape, dtype, pass."""

    title: str
    unit: str
    axis: Markup
    lines: list[Line]


@dataclass(frozen=True, slots=True)
class Group:
    """The cases of one op."""

    title: str
    clock: str
    says: list[str]
    lines: list[Growth]
    """By tokens, where there are many counts; whole ops first."""
    shown: list[Panel]
    folded: list[Panel]
    left: int
    """Cases that only the table of all rows has."""


SHOWN, FOLDED = 6, 40  # panels of an op that are open, and that can be opened
COUNTS = 4  # of tokens, from which on a line says more than a table for each
LINES = 12


def groups(source: Source) -> Iterator[Group]:
    """Of all results with times that are compared with others'."""
    for one in source.of("train", "kernels"):
        file = f" in {one.path.name}" if len(source.of(one.kind)) > 1 else ""
        for rows in grouped(one.rows, lambda row: row.op):
            cases = [case for case in grouped(rows, lambda row: row.case) if any(map(times, case))]
            if not cases:
                continue
            first = _first_shown(cases)
            others = [case for i, case in enumerate(cases) if i not in first]
            whole = [row for row in rows if row.phase == cases[first[0]][0].phase]
            yield Group(
                (f"Training step: {rows[0].op.upper()}" if one.kind == "train" else rows[0].op) + file,
                _clock(one, rows),
                _says(cases),
                growths(whole, TIME_TAKEN, COUNTS)[:LINES],
                [_panel(cases[i]) for i in first],
                [_panel(case) for case in others[:FOLDED]],
                len(others[FOLDED:]),
            )


def _first_shown(cases: Sequence[Sequence[Row]]) -> list[int]:
    """The whole of an op, forward and backward, at the largest shapes."""
    last = {case[0].phase for case in cases if "+" in case[0].phase} or {case[0].phase for case in cases}
    able = [i for i, case in enumerate(cases) if case[0].phase in last]
    cost = {i: max((row.flops or 0.0) for row in cases[i]) for i in able}
    return sorted(sorted(able, key=lambda i: -cost[i])[:SHOWN])


def _panel(case: Sequence[Row]) -> Panel:
    seconds = [figure for row in case if (figure := times(row)) is not None]
    divisor, unit = scale("s", max(figure.p50 for figure in seconds))
    axis = from_zero([figure.p95 / divisor for figure in seconds])
    mine = main_of(case)
    base = times(mine) if mine is not None else None
    words = [case[0].shape_text, case[0].dtype, case[0].phase.replace("step", "")]
    title = ", ".join(word for word in words if word)
    return Panel(title, unit, axis_cell(axis), [_line(row, axis, divisor, base) for row in case])


def _line(row: Row, axis: Axis, divisor: float, base: Figure | None) -> Line:
    time, memory = times(row), row.figures.get(MEMORY)
    name = row.variant
    if time is None:
        return Line(name, is_ours(row), Markup(), "", None, "", "", None, row.status)
    title = f"{name}: {quantity(time.p05, 's')} to {quantity(time.p95, 's')}, {time.n} samples"
    places = (figure / divisor for figure in (time.p05, time.p50, time.p95))
    beside = ratio(time, base) if base is not time else None
    return Line(
        name,
        is_ours(row),
        interval_cell(axis, *places, ours=is_ours(row), title=title),
        median_of(time),
        time.p50,
        "1" if base is time else ratio_text(beside),
        median_of(memory),
        None if memory is None else memory.p50,
    )


def _says(cases: Sequence[Sequence[Row]]) -> list[str]:
    """The sentences above the tables: ours beside the quickest other, over all cases."""
    found: list[tuple[Ratio, Row, Row]] = []
    for case in cases:
        mine = main_of(case)
        alike = [row for row in peers_of(case) if mine is not None and row.dtype == mine.dtype]
        timed = [(time.p50, row) for row in alike if (time := times(row)) is not None]
        if mine is not None and timed:
            quickest = min(timed, key=lambda pair: pair[0])[1]
            beside = ratio(times(quickest), times(mine))
            if beside is not None:
                found.append((beside, quickest, mine))
    if not found:
        return ["No other variant ran beside qtrain's."]
    if len(found) <= 2:
        return [_one_case(*one) for one in found]
    names = list(dict.fromkeys(row.variant for _, row, _ in found))
    low, high = min(r.estimate for r, _, _ in found), max(r.estimate for r, _, _ in found)
    slower = sum(r.high < 1 for r, _, _ in found)
    unclear = sum(r.low <= 1 <= r.high for r, _, _ in found)
    said = (
        f"The quickest other variant ({listed(names)}) takes {low:.2f} to {high:.2f} times qtrain's time "
        f"over {len(found)} cases"
    )
    told = [f"in {unclear} the interval includes 1"] if unclear else []
    told += [f"in {slower} qtrain is slower"] if slower else []
    return ["; ".join([said, *told]) + "."]


def _one_case(beside: Ratio, other: Row, mine: Row) -> str:
    said = (
        f"In {mine.dtype} {mine.variant} takes {median_of(times(mine))}; the quickest other is "
        f"{other.variant} with {median_of(times(other))}, {ratio_text(beside)} times as long"
    )
    if beside.verdict(mine.noise_floor or 0.0) == "no difference":
        said += ", no difference beyond the noise"
    x, y = mine.figures.get(MEMORY), other.figures.get(MEMORY)
    if x is not None and y is not None and x.p50 > 0:
        said += f"; memory {median_of(x)} and {median_of(y)}"
    return said + "."


def _clock(results: Results, rows: Sequence[Row]) -> str:
    """What the seconds are, and how far a variant is from itself."""
    if results.kind == "train":
        said = (
            "CPU seconds of all threads for one batch: its step, and its reference pass where that is apart."
        )
    else:
        said = f"Time: {results.protocol.get('clock', 'CPU time of all threads')}."
    floors = [row.noise_floor for row in rows if row.noise_floor is not None]
    if not floors:
        return f"{said} No variant was run twice, so the noise is not known."
    low, high = min(floors), max(floors)
    among = f"{high:.0%}" if round(low, 2) == round(high, 2) else f"{low:.0%} to {high:.0%}"
    return f"{said} A variant run twice differed from itself by up to {among}."
