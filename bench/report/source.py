"""What a page is made of: results, and the rows of them that belong together."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

from ..result_files import read_results
from ..results import AGAIN, OURS, TIME, Figure, Results, ResultsError, Row
from ..statistics import Ratio, Runs, ratio_of_medians


@dataclass(frozen=True, slots=True)
class Run:
    """A run directory's logged steps."""

    name: str
    steps: tuple[dict[str, Any], ...]

    @property
    def method(self) -> str:
        """`dpo` where preferences are logged."""
        return "dpo" if any("rewards/margins" in step for step in self.steps) else "sft"


@dataclass(frozen=True)
class Source:
    """Everything that one page is about."""

    results: tuple[Results, ...]
    runs: tuple[Run, ...] = ()

    def of(self, *kinds: str) -> list[Results]:
        """The files of the kinds, in the kinds' order."""
        return [one for kind in kinds for one in self.results if one.kind == kind]

    def rows(self, *kinds: str) -> list[Row]:
        """Of the kinds, or all."""
        return [row for one in self.results if not kinds or one.kind in kinds for row in one.rows]

    @property
    def timed_on_gpu(self) -> bool:
        """Whether any time was taken on a GPU."""
        return any(
            one.setting.get("device") == "cuda" and any(TIME in row.figures for row in one.rows)
            for one in self.results
        )


def read_source(files: Sequence[Path], runs: Sequence[Path]) -> Source:
    """Of result files and run directories; another folder stands for all *.json in it.

    Raises:
        ResultsError: no file, or one that is no result; a run without metrics.
    """
    paths: list[Path] = []
    folders = list(runs)
    for path in files:
        if (path / "metrics.jsonl").is_file():
            folders.append(path)
            continue
        found = sorted(path.glob("*.json")) if path.is_dir() else [path]
        if not found:
            raise ResultsError(
                f"{path}: no *.json in it; qtrain bench kernels --out {path}/kernels.json makes one"
            )
        paths += found
    return Source(tuple(read_results(path) for path in paths), tuple(read_run(run) for run in folders))


def read_run(folder: Path) -> Run:
    """Logged steps of a run directory, or of a metrics.jsonl.

    Raises:
        ResultsError: there are none, or a line is no step.
    """
    path = folder / "metrics.jsonl" if folder.is_dir() else folder
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise ResultsError(f"--runs {folder}: no readable metrics.jsonl, as a run directory has") from None
    steps = []
    for number, line in enumerate(lines, 1):
        try:
            step = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):  # of a run that is writing it
                break
            raise ResultsError(f"{path}:{number}: not JSON") from None
        if not isinstance(step, dict) or not isinstance(step.get("step"), int):
            raise ResultsError(f"{path}:{number}: not a logged step: no whole number 'step'")
        steps.append(step)
    if not steps:
        raise ResultsError(f"--runs {folder}: no step has been logged")
    return Run(path.parent.name or str(folder), tuple(steps))


def grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> list[list[Row]]:
    """Rows of one key together, in the order of their first."""
    listed = list(rows)
    order = {one: i for i, one in reversed(list(enumerate(key(row) for row in listed)))}
    return [list(group) for _, group in groupby(sorted(listed, key=lambda row: order[key(row)]), key=key)]


def is_ours(row: Row) -> bool:
    """Whether the variant is qtrain's."""
    return row.variant.startswith(OURS)


def main_of(rows: Iterable[Row]) -> Row | None:
    """Ours as a user gets it: the first of our variants that has figures, not the A/A run."""
    mine = [row for row in rows if is_ours(row) and row.figures and not row.variant.endswith(AGAIN)]
    return next((row for row in mine if row.variant == OURS), mine[0] if mine else None)


def peers_of(rows: Iterable[Row]) -> list[Row]:
    """Others that have figures."""
    return [row for row in rows if row.figures and not is_ours(row)]


def times(row: Row) -> Figure | None:
    """The time that counts: CPU seconds where wall-clock time was recorded as well."""
    return row.figures.get(TIME) or row.figures.get("CPU time")


def ratio(numerator: Figure | None, denominator: Figure | None) -> Ratio | None:
    """Of medians, with an interval where there are samples; None where a side is missing or not > 0."""
    if numerator is None or denominator is None:
        return None
    if min(min(run) for one in (numerator, denominator) for run in one.runs) <= 0:
        return None
    return _ratio(numerator.runs, denominator.runs)


@lru_cache(maxsize=4096)
def _ratio(numerator: Runs, denominator: Runs) -> Ratio:
    """A page asks for some of them twice."""
    return ratio_of_medians(numerator, denominator)
