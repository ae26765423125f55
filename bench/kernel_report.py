"""Rows of the kernel timings as tables: one for each op, part, base and pass, in sections by row count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from .table import Column, figure

MIB = 1 << 20
Row = dict[str, Any]

_ALWAYS = (
    Column("M"),
    Column("variant", numeric=False),
    Column("ms (p05–p95)"),
    Column("time / qtrain's [95 %]"),
    Column("than qtrain", numeric=False),
    Column("MiB"),
)
_ROOFLINE = Column("roofline")


def columns(rows: Sequence[Row]) -> tuple[Column, ...]:
    """The roofline is shown where the card's rates are known."""
    return (*_ALWAYS, _ROOFLINE) if any("roofline_share" in row for row in rows) else _ALWAYS


def tables(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """(title, rows) of each table, in the order of the rows."""

    def key(row: Row) -> tuple[str, ...]:
        return (row["op"], row["model"], row["part"], row["base"], row["dtype"], row["pass"])

    for one in dict.fromkeys(key(row) for row in rows):
        mine = [row for row in rows if key(row) == one]
        yield _title(mine[0]), mine


def _title(row: Row) -> str:
    n = "+".join(str(count) for count in row["columns"])
    weight = "" if row["op"] == "linear_logprob" else f" {row['base']}"
    return (
        f"{row['op']} {row['pass']}: {row['model']} {row['part']}{weight}, N {n}, K {row['inner']}, "
        f"{row['dtype']}"
    )


def cells(row: Row, with_roofline: bool) -> list[str]:
    """One line, as `columns`; a variant without a speed says what happened, in one or two words."""
    m = str(row["rows"]) if row["rows"] else "–"
    if "p50_s" not in row:
        line = [m, row["variant"], "–", "–", brief(row["status"]), "–"]
    else:
        line = [m, row["variant"], _spread(row), _ratio(row), _verdict(row), _mib(row["peak_bytes"])]
    if with_roofline:
        share = row.get("roofline_share")
        line.append("–" if share is None else f"{share:.0%}")
    return line


def brief(status: str) -> str:
    """What fits a cell: the status up to its reason."""
    return status.partition(":")[0]


def notes(rows: Sequence[Row]) -> list[str]:
    """Full reasons of the variants without a speed, each once, with the cases that it holds for."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            where = f"{row['op']} {row['model']} {row['part']} {row['base']} M {row['rows']}"
            found.setdefault((row["variant"], row["status"]), []).append(where)
    lines: list[str] = []
    for (variant, status), places in found.items():
        first, *others = dict.fromkeys(places)
        more = f" and {len(others)} more" if others else ""
        absent = status.startswith(("not installed", "runs on"))
        lines.append(f"{variant}: {status}" + ("" if absent else f" ({first}{more})"))
    return lines


def sections(rows: Sequence[Row]) -> list[list[Row]]:
    """Of one table, by row count."""
    return [list(group) for _, group in groupby(rows, key=lambda row: row["rows"])]


def _spread(row: Row) -> str:
    p05, p50, p95 = (1e3 * row[name] for name in ("p05_s", "p50_s", "p95_s"))
    digits = 3 if p50 < 1 else 2 if p50 < 10 else 1 if p50 < 100 else 0
    return f"{p50:.{digits}f} ({p05:.{digits}f}–{p95:.{digits}f})"


def _ratio(row: Row) -> str:
    if "ratio" not in row:
        return "–"
    low, estimate, high = row["ratio"]
    return figure(estimate, 2) + ("" if low == high else f" [{low:.2f}, {high:.2f}]")


def _verdict(row: Row) -> str:
    if row.get("verdict") == "noise" and row["noise_floor"] is not None:
        return f"noise ±{row['noise_floor']:.0%}"
    return str(row.get("verdict", "ok"))


def _mib(count: int | None) -> str:
    return "–" if count is None else figure(count / MIB, 1 if count < 100 * MIB else 0)
