"""Reading a result file, whichever benchmark wrote it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .result_long import long_rows
from .result_readers import READERS
from .results import Results, ResultsError, Row

# the key that holds the rows of a kind, where it is not `rows`
_ROWS = {"train": "samples", "cards": "cards"}


def read_results(path: Path) -> Results:
    """The rows of one file.

    Raises:
        ResultsError: it can't be read, is no result of a benchmark, or a row of it is damaged.
    """
    report = _object(path)
    kind = _kind(report)
    if kind is None:
        known = ", ".join(READERS)
        raise ResultsError(
            f"{path}: not a benchmark's result: it has no 'kind' ({known} or another) and no list 'rows'"
        )
    if not isinstance(report.get(_ROWS.get(kind, "rows")), list):
        raise ResultsError(f"{path}: no list {_ROWS.get(kind, 'rows')!r}, as results of kind {kind!r} have")
    about = report if kind == "ops" else report.get("provenance") or {}
    protocol = report.get("protocol") or {}
    if not isinstance(about, dict) or not isinstance(protocol, dict):
        raise ResultsError(f"{path}: 'provenance' and 'protocol' have to be objects")
    rows = _rows(path, READERS.get(kind, long_rows), report)
    kept = {name: about[name] for name in _PROVENANCE if name in about}
    return Results(path, kind, rows, _setting(kind, report, kept, protocol), kept, protocol)


_PROVENANCE = ("time", "command", "source", "versions", "machine")


def _object(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ResultsError(f"{path}: can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ResultsError(f"{path}: not JSON: it is no UTF-8 text") from None
    try:
        report = json.loads(text)
    except json.JSONDecodeError as error:
        raise ResultsError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    except RecursionError:
        raise ResultsError(f"{path}: not a benchmark's result: nested too deep") from None
    if not isinstance(report, dict):
        raise ResultsError(f"{path}: not a benchmark's result: JSON of a {type(report).__name__}")
    return report


def _kind(report: Mapping[str, Any]) -> str | None:
    """`ops_cpu` names none: its rows tell."""
    kind, rows = report.get("kind"), report.get("rows")
    if isinstance(kind, str) and kind:
        return kind
    first = rows[0] if isinstance(rows, list) and rows else None
    return "ops" if isinstance(first, dict) and "ours_cpu_s" in first else None


def _rows(
    path: Path, reader: Callable[[Mapping[str, Any]], Iterator[Row]], report: Mapping[str, Any]
) -> tuple[Row, ...]:
    try:
        rows = tuple(reader(report))
    except ValueError as error:
        raise ResultsError(f"{path}: {error}") from None
    if not rows:
        raise ResultsError(f"{path}: it has no rows")
    seen: set[object] = set()
    for row in rows:
        if row.key in seen:
            raise ResultsError(f"{path}: two rows of {row.variant!r} for {row.where} can't be told apart")
        seen.add(row.key)
    return rows


def _setting(
    kind: str, report: Mapping[str, Any], about: Mapping[str, Any], protocol: Mapping[str, Any]
) -> dict[str, str]:
    """What decides how fast anything is, in words."""
    machine = _mapping(about.get("machine"))
    gpus = machine.get("gpus") or []
    names = [_gpu(gpu) for gpu in gpus if isinstance(gpu, dict)]
    found: dict[str, Any] = {
        "device": protocol.get("device"),
        "CPU": machine.get("cpu"),
        "CPU features": " ".join(map(str, machine.get("cpu_features") or [])),
        "GPU": ", ".join(names) or "none",
        "threads": protocol.get("threads", report.get("threads", machine.get("threads"))),
        "clock": protocol.get("clock"),
        "caches": {True: "cold", False: "hot"}.get(protocol.get("cold", "")),
    }
    setting = {name: str(value) for name, value in found.items() if value not in (None, "")}
    if kind == "cards":  # compiled for the GPUs named in the rows, whatever machine that was done on
        setting = {}
    for name, value in (_mapping(report.get("workload")) | _mapping(protocol.get("setting"))).items():
        if name != "seed":
            setting[str(name)] = str(value)
    return setting


def _gpu(gpu: Mapping[str, Any]) -> str:
    limit = gpu.get("power.limit")
    return f"{gpu.get('name', 'unknown')}" + (f" at {limit}" if limit else "")


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, dict) else {}
