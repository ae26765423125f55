"""The runs of a folder, as far as their files tell: a damaged or foreign folder is named, never hidden."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qtrain.errors import UserError

from .rundir import RunDir

WIDE = 100  # columns from which the parent, the quantisation and the held-out loss have room


@dataclass(frozen=True, slots=True)
class RunSummary:
    """One line of `qtrain runs`; None where the run's files do not say."""

    name: str
    path: Path
    time: float  # seconds since the epoch: when it was started, else when its folder last changed
    size: int  # bytes on disk
    problem: str | None = None  # why the folder can't be read as a run
    parent: str | None = None
    method: str | None = None
    base: str | None = None
    quantization: str | None = None
    state: str | None = None
    steps: int | None = None
    final_loss: float | None = None
    eval_loss: float | None = None
    eval_score: float | None = None  # 0..1
    eval_rows: int | None = None


def list_runs(folder: Path) -> list[RunSummary]:
    """Every folder below `folder`, oldest first.

    Raises:
        UserError: `folder` is a file, or is not there.
    """
    if not folder.is_dir():
        what = "is a file, not a folder of runs" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {what}; qtrain run makes runs in runs/")
    found = [summarise(path) for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return sorted(found, key=lambda run: (run.time, run.name))


def summarise(path: Path) -> RunSummary:
    """What a folder's recipe, manifest, status and evaluation say; never raises for what is in them."""
    run, size = RunDir(path), folder_bytes(path)
    stamp = path.stat().st_mtime
    if not run.exists():
        return RunSummary(path.name, path, stamp, size, problem="not a run: it has no recipe.yaml")
    try:
        recipe, status = _recipe(run.recipe), run.status()
        manifest, score = _json(run.manifest), _json(path / "eval.json")
    except UserError as error:
        return RunSummary(path.name, path, stamp, size, problem=str(error))
    figures = _section(score, "score")
    return RunSummary(
        path.name,
        path,
        _timestamp(manifest.get("time")) or run.recipe.stat().st_mtime,
        size,
        parent=_text(recipe.get("parent")),
        method=_text(_section(recipe, "training").get("method")),
        base=_text(_section(recipe, "model").get("name")),
        quantization=_text(_section(recipe, "model").get("quantization")),
        state=_text(status.get("state")) or "not started",
        steps=_whole(status.get("step")),
        final_loss=_number(status.get("final_loss")),
        eval_loss=_number(status.get("eval_loss")),
        eval_score=_number(figures.get("mean")),
        eval_rows=_whole(figures.get("rows")),
    )


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; what vanishes meanwhile (a checkpoint being replaced) counts 0."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size if not path.is_dir() else 0
        except FileNotFoundError:
            continue
    return total


def as_dict(run: RunSummary) -> dict[str, Any]:
    """For JSON: the time in ISO 8601, the path as text."""
    iso = datetime.fromtimestamp(run.time, timezone.utc).isoformat(timespec="seconds")
    return asdict(run) | {"path": str(run.path), "time": iso}


def show_runs(found: list[RunSummary], folder: Path, console: Console) -> None:
    """A table for 100 columns; narrower terminals get fewer columns, which is said below it."""
    if not found:
        console.print(
            f"no runs in {folder}; start one with: qtrain run --4bit", markup=False, highlight=False
        )
        return
    wide = console.width >= WIDE
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, right, shown in _COLUMNS:
        if shown or wide:
            table.add_column(name, justify="right" if right else "left", no_wrap=True, overflow="ellipsis")
    for run in found:
        if run.problem is None:
            table.add_row(
                *[cell for cell, (_, _, shown) in zip(_cells(run), _COLUMNS, strict=True) if shown or wide]
            )
    if table.row_count:
        console.print(table, highlight=False, markup=False)
    for run in found:
        if run.problem is not None:
            console.print(
                f"{run.path}: {run.problem}", style="yellow", markup=False, highlight=False, soft_wrap=True
            )
    if table.row_count and not wide:
        console.print(
            f"({', '.join(name for name, _, shown in _COLUMNS if not shown)}: at {WIDE} columns, or --json)",
            style="dim",
        )


_COLUMNS = (  # name, whether its figures are flush right, whether a narrow terminal has it
    ("run", False, True),
    ("from", False, False),
    ("method", False, True),
    ("base", False, True),
    ("weights", False, False),
    ("state", False, True),
    ("steps", True, True),
    ("loss", True, True),
    ("eval loss", True, False),
    ("score", True, True),
    ("size", True, True),
)


def _cells(run: RunSummary) -> list[str]:
    return [
        run.name,
        "-" if run.parent is None else Path(run.parent).name,
        run.method or "?",
        (run.base or "?").rstrip("/").rpartition("/")[2],
        {"none": "16-bit", None: "?"}.get(run.quantization, str(run.quantization)),
        run.state or "?",
        "-" if run.steps is None else str(run.steps),
        "-" if run.final_loss is None else f"{run.final_loss:.4f}",
        "-" if run.eval_loss is None else f"{run.eval_loss:.4f}",
        "-" if run.eval_score is None else f"{run.eval_score:.1%}",
        size_text(run.size),
    ]


def size_text(size: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _recipe(path: Path) -> Mapping[str, Any]:
    from qtrain.recipe.load import load_tree

    return load_tree(path)


def _json(path: Path) -> Mapping[str, Any]:
    """A JSON object, empty where there is no file.

    Raises:
        UserError: it can't be read as one.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path.name} can't be read: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path.name} is no JSON object")
    return value


def _section(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = tree.get(name)
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _timestamp(value: object) -> float | None:
    try:
        return datetime.fromisoformat(str(value)).timestamp()
    except ValueError:
        return None
