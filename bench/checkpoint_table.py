"""The checkpoints' benchmark as tables: a line for every checkpoint, and one for every engine it ran in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .results import OK
from .statistics import median
from .table import Column

MIB = 1 << 20

QUALITY = (
    Column("checkpoint", numeric=False),
    Column("MiB on disk"),
    Column("bits / weight"),
    Column("KL to 16 bits [95 %]"),
    Column("perplexity"),
    Column("top-1"),
    Column("status", numeric=False),
)
SERVE = (
    Column("checkpoint", numeric=False),
    Column("engine", numeric=False),
    Column("batch"),
    Column("MiB loaded"),
    Column("MiB at peak"),
    Column("prefill tok/s"),
    Column("decode tok/s"),
    Column("TTFT ms"),
    Column("TPOT ms"),
    Column("throughput tok/s"),
    Column("task score"),
    Column("status", numeric=False),
)

Row = Mapping[str, Any]


def quality_cells(row: Row) -> list[str]:
    """A line of the first table, as QUALITY."""
    figures = row["figures"]
    if not figures:
        return [row["variant"], *["–"] * 5, row["status"]]
    low, high = figures["KL"]["interval"]
    value = figures["KL"]["value"]
    bits = figures.get("bits per weight")
    return [
        row["variant"],
        f"{figures['size'] / MIB:.0f}",
        "–" if bits is None else f"{bits:.2f}",
        "0" if value == 0 else f"{value:.4f} [{low:.4f}, {high:.4f}]",
        f"{figures['perplexity']:.3f}",
        f"{figures['top-1 agreement']:.1%}",
        row["status"],
    ]


def serve_cells(row: Row) -> list[str]:
    """A line of the second table, as SERVE."""
    name, shape, figures = row["variant"], row["shape"], row["figures"]
    if row["status"] != OK:
        return [name, shape["engine"], str(shape["batch"]), *["–"] * 8, row["status"]]

    def mid(figure: str, factor: float = 1, digits: int = 0) -> str:
        return f"{factor * median(figures[figure]['runs']):.{digits}f}"

    task = figures.get("task score")
    return [
        name,
        shape["engine"],
        str(shape["batch"]),
        mid("memory loaded", 1 / MIB),
        mid("memory", 1 / MIB),
        mid("prefill"),
        mid("decode", digits=1),
        mid("TTFT", 1000),
        mid("TPOT", 1000, 1),
        mid("throughput", digits=1),
        "–" if task is None else f"{task['value']:.0%}",
        row["status"],
    ]


def split(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """(quality, serve); a checkpoint that is not served keeps one line, not one for each batch size."""
    quality = [row for row in rows if row["op"] == "quality"]
    return quality, [row for row in rows if row["op"] == "serve"]
