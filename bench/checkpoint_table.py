"""The checkpoints' benchmark as tables: of every checkpoint, every engine it ran in, every batch size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .results import AGAIN, OK
from .statistics import median
from .table import Column

MIB = 1 << 20

QUALITY = (
    Column("checkpoint", numeric=False),
    Column("MiB"),
    Column("bits"),
    Column("KL [95 %]"),
    Column("ppl"),
    Column("top-1"),
)
ENGINES = (
    Column("checkpoint", numeric=False),
    Column("engine", numeric=False),
    Column("MiB"),
    Column("at peak"),
    Column("task [95 %]"),
)
SPEED = (
    Column("checkpoint", numeric=False),
    Column("engine", numeric=False),
    Column("batch"),
    Column("prefill"),
    Column("decode"),
    Column("all"),
    Column("TTFT"),
    Column("TPOT"),
)

Row = Mapping[str, Any]


def quality_cells(row: Row) -> list[str]:
    """A line of the first table, as QUALITY."""
    figures = row["figures"]
    if not figures:
        return [row["variant"], *["–"] * 5]
    low, high = figures["KL"]["interval"]
    value = figures["KL"]["value"]
    bits = figures.get("bits per weight")
    return [
        row["variant"],
        f"{figures['size'] / MIB:.0f}",
        "–" if bits is None else f"{bits:.2f}",
        "0" if value == 0 else f"{value:.3f} [{low:.3f}, {high:.3f}]",
        f"{figures['perplexity']:.2f}",
        f"{figures['top-1 agreement']:.0%}",
    ]


def engine_cells(row: Row) -> list[str]:
    """A line of the second table, as ENGINES."""
    name, engine, figures = _name(row), row["engine"], row["figures"]
    if row["status"] != OK:
        return [name, engine, *["–"] * 3]
    task, score = figures.get("task score"), "–"
    if task is not None:
        low, high = task["interval"]
        score = f"{task['value']:.0%} [{low:.0%}, {high:.0%}]"
    return [
        name,
        engine,
        _mid(row, "memory loaded", 1 / MIB),
        _mid(row, "memory", 1 / MIB),
        score,
    ]


def speed_cells(row: Row) -> list[str]:
    """A line of the third table, as SPEED; of a row that is ok."""
    return [
        _name(row),
        row["engine"],
        str(row["shape"]["batch"]),
        _mid(row, "prefill"),
        _mid(row, "decode"),
        _mid(row, "throughput"),
        _mid(row, "TTFT", 1000),
        _mid(row, "TPOT", 1000),
    ]


def _name(row: Row) -> str:
    return str(row["checkpoint"]) + (AGAIN if row["variant"].endswith(AGAIN) else "")


def _mid(row: Row, figure: str, factor: float = 1) -> str:
    value = factor * median(row["figures"][figure]["runs"])
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def tables(rows: Sequence[Row]) -> list[tuple[str, tuple[Column, ...], list[list[str]]]]:
    """(title, columns, lines): what the files hold, what engines take, how fast they are."""
    served = [row for row in rows if row["op"] == "serve"]
    ones: dict[str, Row] = {}  # a line for an engine, whatever the batch sizes
    for row in served:
        ones.setdefault(row["variant"], row)
    found = [
        (
            "What the files hold: MiB on disk, bits a weight, KL to 16 bits",
            QUALITY,
            [quality_cells(row) for row in rows if row["op"] == "quality"],
        ),
        (
            "What engines take: MiB after loading, and make of the task",
            ENGINES,
            [engine_cells(row) for row in ones.values()],
        ),
        (
            "How fast they are: tokens a second, milliseconds",
            SPEED,
            [speed_cells(row) for row in served if row["status"] == OK],
        ),
    ]
    return [table for table in found if table[2]]


def notes(rows: Sequence[Row]) -> list[str]:
    """Why there is a dash, of every checkpoint and engine that is not ok; and how much of a speed is luck."""
    floors = {row["shape"]["batch"]: row["noise_floor"] for row in rows if "noise_floor" in row}
    lines = [
        f"noise: decode at batch {size} differs by {floor:.0%} from itself" for size, floor in floors.items()
    ]
    for row in rows:
        if row["status"] != OK:
            lines.append(f"{row['variant']}: {row['status']}")
    return list(dict.fromkeys(lines))
