"""Every row of every file, and where each file came from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..results import MEMORY, OK, Figure, Results, Row
from .source import Source, is_ours, times
from .text import digits, quantity

MIB = 1 << 20
# written unit and divisor of a column
_UNITS = {"s": ("ms", 1e-3), "bytes": ("MiB", float(MIB)), "share": ("%", 0.01)}
_FIXED = ("time", "CPU time", MEMORY)


@dataclass(frozen=True, slots=True)
class Cell:
    """What is shown, and what is sorted by; words sort as words."""

    text: str
    value: float | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """One row."""

    cells: list[Cell]
    ours: bool
    failed: bool


@dataclass(frozen=True, slots=True)
class Table:
    """Names, units and whether a column is of numbers."""

    columns: list[tuple[str, str, bool]]
    lines: list[Line]


@dataclass(frozen=True, slots=True)
class Origin:
    """One file: (name, value) pairs in words."""

    title: str
    facts: list[tuple[str, str]]


_WORDS = ("file", "op", "variant", "pass", "dtype", "shape", "status")


def table(source: Source) -> Table:
    """All rows; columns of figures that no row has are left out."""
    rows = [(one, row) for one in source.results for row in one.rows]
    names = list(dict.fromkeys(name for _, row in rows for name in row.figures if name not in _FIXED))
    units = {figure.name: figure.unit for _, row in rows for figure in row.figures.values()}
    columns = [(name, "", False) for name in _WORDS]
    columns += [("n", "", True), *((name, "ms", True) for name in ("p05", "p50", "p95"))]
    columns += [("memory", "MiB", True), ("ideal bytes", "MB", True), ("work", "GFLOP", True)]
    columns += [("roofline", "%", True)]
    columns += [(name, _UNITS.get(units[name], (units[name], 1.0))[0], True) for name in names]
    lines = [_line(one, row, names) for one, row in rows]
    used = [
        i for i, (name, _, numeric) in enumerate(columns)
        if not numeric or any(line.cells[i].value is not None for line in lines)
    ]  # fmt: skip
    return Table(
        [columns[i] for i in used],
        [Line([line.cells[i] for i in used], line.ours, line.failed) for line in lines],
    )


def _line(results: Results, row: Row, names: Sequence[str]) -> Line:
    status = f"{row.status}: {row.reason}" if row.reason else row.status
    words = (results.path.stem, row.op, row.variant, row.phase, row.dtype, row.shape_text, status)
    time = times(row)
    cells = [Cell(word) for word in words]
    cells.append(_number(None if time is None else float(time.n), 1.0, whole=True))
    cells += [_number(value, 1e-3) for value in (_three(time))]
    memory = row.figures.get(MEMORY)
    cells.append(_number(None if memory is None else memory.p50, float(MIB)))
    share = row.roofline_share
    cells += [_number(row.ideal_bytes, 1e6), _number(row.flops, 1e9), _number(share, 0.01)]
    for name in names:
        figure = row.figures.get(name)
        divisor = _UNITS.get(figure.unit, ("", 1.0))[1] if figure is not None else 1.0
        cells.append(_number(None if figure is None else figure.p50, divisor, count=4))
    return Line(cells, is_ours(row), row.status != OK)


def _three(time: Figure | None) -> tuple[float | None, float | None, float | None]:
    return (None, None, None) if time is None else (time.p05, time.p50, time.p95)


def _number(value: float | None, divisor: float, *, whole: bool = False, count: int = 3) -> Cell:
    if value is None:
        return Cell("")
    return Cell(str(int(value)) if whole else digits(value / divisor, count), value)


def origins(source: Source) -> Iterator[Origin]:
    """Of each file."""
    for one in source.results:
        yield Origin(f"{one.path.name}: {one.kind}", list(_facts(one)))


def _facts(one: Results) -> Iterator[tuple[str, str]]:
    about, machine = one.provenance, _mapping(one.provenance.get("machine"))
    source = _mapping(about.get("source"))
    yield "time", str(about.get("time", "not stated"))
    commit = source.get("commit")
    changes = " with uncommitted changes" if source.get("dirty") else ", clean tree"
    yield "commit", f"{commit}{changes}" if commit else "not stated"
    yield "command", " ".join(map(_short, about.get("command") or ())) or "not stated"
    load = machine.get("load")
    facts = {
        "CPU": machine.get("cpu"),
        "instructions": ", ".join(map(str, machine.get("cpu_features") or ())),
        "cores": machine.get("cores"),
        "threads": one.setting.get("threads"),
        "memory": _memory(machine.get("memory")),
        "GPUs": "; ".join(_words(gpu) for gpu in machine.get("gpus") or ()) or "none",
        "clocks before": "; ".join(_words(gpu) for gpu in machine.get("gpu_clocks_before") or ()),
        "clocks after": "; ".join(_words(gpu) for gpu in machine.get("gpu_clocks_after") or ()),
        "system": machine.get("system"),
        "load at the start": ", ".join(f"{value:.2f}" for value in load) if isinstance(load, list) else None,
    }
    yield from ((name, str(value)) for name, value in facts.items() if value)
    versions = ", ".join(f"{name} {value or 'not installed'}" for name, value in one.versions.items())
    yield "versions", versions or "not stated"
    if one.protocol:
        yield "protocol", _words(one.protocol)


def _short(word: object) -> str:
    """An absolute path by its last name: the folders are of no use elsewhere."""
    text = str(word)
    return f"…/{text.rpartition('/')[2]}" if text.startswith("/") else text


def _memory(text: object) -> str | None:
    """`24684084 kB`, as the kernel says it, in GiB."""
    count, _, unit = str(text or "").partition(" ")
    return quantity(int(count) * 1024, "bytes") if unit == "kB" and count.isdecimal() else None


def _words(value: Any) -> str:
    """`{a: 1, b: [2]}` -> `a 1, b [2]`."""
    if not isinstance(value, Mapping):
        return str(value)
    return ", ".join(
        f"{name.replace('_', ' ')} {inner if isinstance(inner, str) else json.dumps(inner)}"
        for name, inner in value.items()
        if inner is not None
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
