"""What quantised checkpoints lose, by what they take on disk."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup

from ..results import Figure, Row
from .axes import Axis, around, from_zero
from .plots import Series, axis_cell, interval_cell, plot
from .source import Source, grouped, is_ours
from .text import digits, median_of, quantity, scale

LOSSES = ("KL", "perplexity")
FURTHER = (
    *("perplexity", "top-1 agreement", "task score", "bits per weight", "size", "CPU time", "wall time"),
    *("memory", "memory loaded", "prefill", "decode", "throughput", "TTFT", "TPOT"),
)


NEAR = 0.3  # of the range of sizes: names of points with others so near on their right stand on the left


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A line of the table."""

    name: str
    ours: bool
    cell: Markup
    loss: str
    value: float | None
    figures: list[str]
    status: str


@dataclass(frozen=True, slots=True)
class Table:
    """Checkpoints of one scheme, the one that loses least first."""

    title: str
    loss: str
    axis: Markup
    columns: list[str]
    lines: list[Checkpoint]


@dataclass(frozen=True, slots=True)
class Quality:
    """Both views of one benchmark's checkpoints, which are all of one model."""

    title: str
    says: str
    picture: Markup | None
    tables: list[Table]


def quality(source: Source) -> list[Quality]:
    """Of each benchmark that holds such rows."""
    benchmarks = grouped(source.rows(), lambda row: row.benchmark)
    return [_of_one(rows) for rows in benchmarks if any(_loss(row) for row in rows)]


def _of_one(rows: Sequence[Row]) -> Quality:
    schemes = grouped(rows, lambda row: (row.dtype, row.shape_text))
    if len(schemes) == len(rows):  # one of each: beside each other
        schemes = [list(rows)]
    tables = [_table(alike) for alike in schemes]
    sized = [row for row in rows if "size" in row.figures and _loss(row)]
    picture = _picture(sized) if len(sized) > 1 else None
    found = [table for table in tables if table is not None]
    return Quality(rows[0].benchmark.capitalize(), _says(rows), picture, found)


def _loss(row: Row) -> Figure | None:
    return next((row.figures[name] for name in LOSSES if name in row.figures), None)


def _scheme(row: Row) -> str:
    return ", ".join(part for part in (row.dtype, row.shape_text) if part)


def _value(row: Row) -> float:
    loss = _loss(row)
    return math.inf if loss is None else loss.p50


def _says(rows: Sequence[Row]) -> str:
    losing = [row for row in rows if "KL" in row.figures and row.figures["KL"].p50 > 0]  # 0: the model itself
    if not losing:
        return "Lower is better."
    least = min(losing, key=lambda row: row.figures["KL"].p50)
    scheme = f" ({_scheme(least)})" if _scheme(least) else ""
    return (
        f"Of {len(losing)} checkpoints {least.variant}{scheme} is nearest to the "
        f"16-bit model: a mean KL divergence of {digits(least.figures['KL'].p50)} nats a token."
    )


def _picture(rows: Sequence[Row]) -> Markup:
    name = "KL" if all("KL" in row.figures for row in rows) else "perplexity"
    rows = [row for row in rows if name in row.figures]
    divisor, unit = scale("bytes", max(row.figures["size"].p50 for row in rows))
    common = set.intersection(*(set(row.shape) for row in rows))
    sizes = [row.figures["size"].p50 for row in rows]
    span = max(sizes) - min(sizes) or 1.0
    series = []
    for row in rows:
        loss, size = row.figures[name], row.figures["size"].p50
        low, high = _ends(loss)
        label = ", ".join([row.variant, *_own(row, common)])
        series.append(
            Series(
                label, [size / divisor], [loss.p50], [low], [high], ours=is_ours(row), line=False,
                left=any(0 < (other - size) / span < NEAR for other in sizes),
                titles=[f"{label}: {name} {digits(loss.p50)}, {quantity(size, 'bytes')}"],
            )
        )  # fmt: skip
    y = from_zero([high for one in series for high in one.high or ()])
    if name == "perplexity":
        y = around([v for one in series for v in one.y], 0.15)
    return plot(
        series, around([one.x[0] for one in series], 0.55), y, x_name=f"{unit} on disk",
        y_name=f"{name}{', nats a token' if name == 'KL' else ''}", height=340, label_room=90, kind="dense",
    )  # fmt: skip


def _own(row: Row, common: Collection[tuple[str, Any]]) -> list[str]:
    """The parts of its shape that not all rows have; words of a scheme that the name tells are left out."""
    differing = [pair for pair in row.shape if pair not in common and not isinstance(pair[1], str)]
    return [f"{name.removesuffix('_size')} {value}" for name, value in differing]


def _ends(figure: Figure) -> tuple[float, float]:
    return figure.interval or (figure.p05, figure.p95)


def _table(rows: Sequence[Row]) -> Table | None:
    losses = [loss for row in rows if (loss := _loss(row)) is not None]
    if not losses:
        return None
    axis = from_zero([_ends(loss)[1] for loss in losses])
    columns = [
        name for name in FURTHER if any(name in row.figures for row in rows) and name != losses[0].name
    ]
    alike = len({(row.dtype, row.shape_text) for row in rows}) == 1
    title = _scheme(rows[0]) if alike else rows[0].benchmark.capitalize()
    named = [row if alike else replace(row, variant=f"{row.variant}, {_scheme(row)}") for row in rows]
    ordered = sorted(named, key=_value)
    unit = " (nats a token)" if losses[0].name == "KL" else ""
    return Table(
        title, losses[0].name + unit, axis_cell(axis), columns, [_line(r, axis, columns) for r in ordered]
    )


def _line(row: Row, axis: Axis, columns: Sequence[str]) -> Checkpoint:
    loss = _loss(row)
    if loss is None:
        return Checkpoint(row.variant, is_ours(row), Markup(), "", None, [], row.status)
    low, high = _ends(loss)
    told = f"{row.variant}: {digits(loss.p50)} [{digits(low)}, {digits(high)}]"
    cell = interval_cell(axis, low, loss.p50, high, ours=is_ours(row), title=told)
    figures = [median_of(row.figures.get(name)) for name in columns]
    return Checkpoint(row.variant, is_ours(row), cell, digits(loss.p50), loss.p50, figures, "")
