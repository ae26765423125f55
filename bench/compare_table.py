"""A comparison for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console

from .compare import Comparison, Line
from .results import Figure
from .table import Column, terminal_table

COLUMNS = (
    Column("case", numeric=False),
    Column("variant", numeric=False),
    Column("A"),
    Column("B"),
    Column("B / A [95 %]"),
    Column("noise"),
    Column("verdict", numeric=False),
)
STYLES = {"better": "green", "worse": "red", "unknown": "yellow"}
LISTED = 40  # rows that only one file has


def show(comparison: Comparison, console: Console) -> None:
    """A table for each figure, then what could not be compared, then the sum of it."""
    a, b = comparison.a, comparison.b
    for name, results in (("A", a), ("B", b)):
        time = results.provenance.get("time", "time unknown")
        console.print(
            f"{name}: {results.path} (commit {results.commit}, {time})", markup=False, soft_wrap=True
        )
    setting = ", ".join(f"{name} {value}" for name, value in a.setting.items() if name in _SHORT)
    if setting:
        console.print(f"{a.kind}; {setting}", markup=False, soft_wrap=True)
    for name in dict.fromkeys(line.a.name for line in comparison.lines):
        lines = [line for line in comparison.lines if line.a.name == name]
        table = terminal_table(_title(lines[0].a), COLUMNS, list(_rows(lines)))
        for place, (row, line) in enumerate(zip(table.rows, lines, strict=True), 1):
            row.style = STYLES.get(line.change)
            row.end_section = place < len(lines) and lines[place].row.case != line.row.case
        console.print(table, markup=False)
    for text in _further(comparison):
        console.print(text, markup=False, soft_wrap=True)
    for note in comparison.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    worse, better = len(comparison.regressions), len(comparison.improvements)
    same = sum(line.change == "same" for line in comparison.lines)
    style = "red" if worse else "green" if better else None
    console.print(f"{worse} worse, {better} better, {same} without a difference", style=style)


_SHORT = ("device", "CPU", "GPU", "threads", "clock", "caches")


def _title(figure: Figure) -> str:
    unit = {"s": "ms", "bytes": "MiB", "share": "%"}.get(figure.unit, figure.unit)
    return figure.name + (f", {unit}" if unit else "")


def _rows(lines: Sequence[Line]) -> Iterator[list[str]]:
    """A case is named once, where its first variant is."""
    previous = None
    for line in lines:
        case, *others = _cells(line)
        yield ["" if line.row.case == previous else case, *others]
        previous = line.row.case


def _cells(line: Line) -> list[str]:
    ratio = line.ratio
    if ratio is None:
        said = "–"
    else:
        said = f"{ratio.estimate:.2f}"
        said += "" if ratio.low == ratio.high else f" [{ratio.low:.2f}, {ratio.high:.2f}]"
    floor = f"±{line.floor:.0%}" + ("" if line.measured_floor else "*")
    return [line.row.where, line.row.variant, _value(line.a), _value(line.b), said, floor, line.verdict]


def _value(figure: Figure) -> str:
    scale = {"s": 1e3, "bytes": 1 / (1 << 20), "share": 100}.get(figure.unit, 1)
    value = figure.p50 * scale
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def _further(comparison: Comparison) -> Iterator[str]:
    for one in comparison.untimed:
        said = one.a if one.a == one.b else f"A {one.a}, B {one.b}"
        yield f"not compared: {one.row.variant}, {one.row.where}: {said}" + (" (broke)" if one.broke else "")
    for name, rows in (("A", comparison.only_a), ("B", comparison.only_b)):
        for row in rows[:LISTED]:
            yield f"only in {name}: {row.variant}, {row.where}"
        if len(rows) > LISTED:
            yield f"only in {name}: {len(rows) - LISTED} more (--json lists all)"
    if any(not line.measured_floor for line in comparison.lines):
        yield "*: no A/A run in either file"
