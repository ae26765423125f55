"""Reading a result file, whichever benchmark wrote it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .result_about import Protocol, Provenance
from .result_checks import Model, first_problem
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
    about = checked(Provenance, report.get("provenance") or {}, path, "provenance")
    protocol = checked(Protocol, report.get("protocol") or {}, path, "protocol")
    rows = _rows(path, READERS.get(kind, long_rows), report)
    setting = _setting(kind, report, about, protocol)
    return Results(path, kind, rows, setting, about.model_dump(), protocol.model_dump(exclude_unset=True))


def checked(model: type[Model], given: Any, path: Path, name: str) -> Model:
    """Of such a form.

    Raises:
        ResultsError: it is not.
    """
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise ResultsError(f"{path}: {name}: {first_problem(error)}") from None


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
    kind = report.get("kind")
    return kind if isinstance(kind, str) and kind else None


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


def _setting(kind: str, report: Mapping[str, Any], about: Provenance, protocol: Protocol) -> dict[str, str]:
    """What decides how fast anything is, in words."""
    machine = about.machine
    found: dict[str, Any] = {
        "device": protocol.device,
        "CPU": machine.cpu,
        "CPU features": " ".join(machine.cpu_features),
        "GPU": ", ".join(_gpu(gpu) for gpu in machine.gpus) or "none",
        "threads": machine.threads if protocol.threads is None else protocol.threads,
        "clock": protocol.clock,
        "caches": None if protocol.cold is None else "cold" if protocol.cold else "hot",
    }
    setting = {name: str(value) for name, value in found.items() if value not in (None, "")}
    if kind == "cards":  # compiled for the GPUs named in the rows, whatever machine that was done on
        setting = {}
    for name, value in (_mapping(report.get("workload")) | protocol.setting).items():
        if name != "seed":
            setting[str(name)] = str(value)
    return setting


def _gpu(gpu: Mapping[str, Any]) -> str:
    limit = gpu.get("power.limit")
    return f"{gpu.get('name', 'unknown')}" + (f" at {limit}" if limit else "")


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, dict) else {}
