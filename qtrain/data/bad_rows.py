"""The file into which rows go that are left out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from qtrain.data.load import ProblemHandler
from qtrain.data.records import Raw


@contextmanager
def bad_rows_file(path: Path | None) -> Iterator[ProblemHandler]:
    """A function that appends a bad row with its reason to `path`, as {"problem", "row"} lines.

    The file appears under its name once all rows are read, and only if there is a bad one; with
    `path` None the rows go nowhere.
    """
    file: IO[str] | None = None

    def keep(problem: str, raw: Raw) -> None:
        nonlocal file
        if path is None:
            return
        if file is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = _partial(path).open("w", encoding="utf-8")
        row = raw.decode("utf-8", "backslashreplace") if isinstance(raw, bytes) else raw
        # ASCII only: a lone surrogate, which may be why the row is bad, has no UTF-8.
        file.write(json.dumps({"problem": problem, "row": row}, default=str) + "\n")

    try:
        yield keep
    finally:
        if file is not None and path is not None:
            file.close()
            _partial(path).replace(path)


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")
