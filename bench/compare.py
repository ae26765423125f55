"""Two results of one benchmark, row by row: ratios of medians with intervals, and verdicts.

The ratio is B's median over A's. For a difference, the 95 % bootstrap interval of the ratio has to clear 1 by
more than the noise floor: how far a variant timed twice in one file (its A/A run) was from itself. What the
files state counts, in the worse of the two; where they state none, what A's rows give, or else B's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .results import AGAIN, BROKEN, MEMORY, OK, OURS, TIME, Figure, Key, Results, ResultsError, Row
from .statistics import Ratio, median, ratio_of_medians

Change = Literal["better", "worse", "same", "unknown"]

LEAST_FLOOR = 0.01  # of every ratio: what is smaller is no difference to anyone
# Resident memory comes in pages and the allocator's habits, and has no interval: the same call was seen to
# differ by 1.5 MiB from run to run. What CUDA's allocator counts is exact.
RESIDENT_FLOOR, RESIDENT_GRAIN = 0.05, 4 << 20
LEAST_DRIFT_TIMES, SEEN_DRIFT = 3, 0.05
RESAMPLES = 1000  # of samples by process, each of which is drawn in a loop
TIMES = (TIME, "CPU time", "wall time", "TTFT", "TPOT")


@dataclass(frozen=True, slots=True)
class Line:
    """One figure of one row that both files have."""

    row: Row
    a: Figure
    b: Figure
    ratio: Ratio | None
    """B / A; without width where one of them is a single value; None where A is 0."""
    floor: float
    measured_floor: bool
    """Whether `floor` comes of an A/A run."""
    change: Change

    @property
    def verdict(self) -> str:
        """In words: of times `faster` and `slower`."""
        if self.change == "same":
            return "no difference"
        if self.change == "unknown":
            return "one sample each"
        if self.a.name in TIMES:
            return "faster" if self.change == "better" else "slower"
        return str(self.change)


@dataclass(frozen=True, slots=True)
class Untimed:
    """A row of both files that has figures in one of them only, or in none."""

    row: Row
    a: str
    b: str  # the statuses

    @property
    def broke(self) -> bool:
        """It worked in A and was tried in vain in B."""
        return self.a == OK and self.b.startswith(BROKEN)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything that two files say of each other."""

    a: Results
    b: Results
    lines: list[Line]
    untimed: list[Untimed]
    only_a: list[Row]
    only_b: list[Row]
    notes: list[str]

    @property
    def regressions(self) -> list[Line | Untimed]:
        """What is worse in B beyond the noise floor, or broke."""
        worse: list[Line | Untimed] = [line for line in self.lines if line.change == "worse"]
        return [*worse, *(one for one in self.untimed if one.broke)]

    @property
    def improvements(self) -> list[Line]:
        """What is better in B beyond the noise floor."""
        return [line for line in self.lines if line.change == "better"]


def compare(
    a: Results,
    b: Results,
    *,
    force: bool = False,
    figures: Sequence[str] = (),
    least_floor: float = LEAST_FLOOR,
    allow_drift: bool = False,
    seed: int = 0,
) -> Comparison:
    """B against A; `figures` are names of those compared, all if none are given.

    With `allow_drift` the noise floor of times is larger by what the other variants' times moved: their code
    is not ours, so that was the machine.

    Raises:
        ResultsError: the files are of different benchmarks, or (without `force`) of different machines,
            threads or settings; they have no row in common; no row has a figure of such a name.
    """
    if a.kind != b.kind:
        raise ResultsError(f"{a.path} holds {a.kind}, {b.path} {b.kind}: compare results of one benchmark")
    differences = setting_differences(a, b)
    if differences and not force:
        raise ResultsError(
            f"{a.path} and {b.path} differ in {'; '.join(differences)}: no ratio would tell that from the "
            "code's part; --force compares anyway"
        )
    theirs = {row.key: row for row in b.rows}
    pairs = [(row, theirs[row.key]) for row in a.rows if row.key in theirs]
    if not pairs:
        raise ResultsError(f"{a.path} and {b.path} have no row in common")
    mine = {row.key for row in a.rows}
    floors = (Floors(a, seed), Floors(b, seed))
    lines = [
        _line(first, second, name, floors, least_floor, seed)
        for first, second in pairs
        for name in first.figures
        if name in second.figures and (not figures or name in figures)
    ]
    if figures and not lines:
        there = ", ".join(dict.fromkeys(name for row in a.rows for name in row.figures))
        raise ResultsError(f"--figure {figures[0]}: the rows of {a.path} have {there}")
    drift = _drift(lines)
    if allow_drift and drift is not None:
        lines = [_widened(line, abs(drift - 1)) for line in lines]
    notes = [f"compared although they differ in {'; '.join(differences)}"] if differences else []
    return Comparison(
        a,
        b,
        lines,
        [_untimed(first, second) for first, second in pairs if not (first.figures and second.figures)],
        [row for row in a.rows if row.key not in theirs],
        [row for row in b.rows if row.key not in mine],
        [*notes, *_notes(a, b, lines, drift)],
    )


def setting_differences(a: Results, b: Results) -> list[str]:
    """`threads (2, 4)`: what decides a speed, and is not the code."""
    return [
        f"{name} ({a.setting.get(name, 'not stated')}, {b.setting.get(name, 'not stated')})"
        for name in dict.fromkeys([*a.setting, *b.setting])
        if a.setting.get(name) != b.setting.get(name)
    ]


class Floors:
    """The noise floors of one file, from its A/A rows, each computed once."""

    def __init__(self, results: Results, seed: int) -> None:
        self._seed = seed
        self.exact_memory = results.setting.get("device") == "cuda"
        first = {row.key: row for row in results.rows if not row.variant.endswith(AGAIN)}
        self._of_case: dict[Key, list[tuple[Row, Row]]] = {}
        self._of_op: dict[tuple[str, str], list[tuple[Row, Row]]] = {}
        for row in results.rows:
            if row.variant.endswith(AGAIN) and row.key_of_first in first:
                pair = (first[row.key_of_first], row)
                self._of_case.setdefault(row.case, []).append(pair)
                self._of_op.setdefault((row.op, row.phase), []).append(pair)
        self._found: dict[tuple[Key, str], float | None] = {}

    def of(self, row: Row, name: str) -> float | None:
        """What the file states; else of the A/A run of the row's case, or the largest of its op and pass."""
        if name == TIME and row.noise_floor is not None:
            return row.noise_floor
        own = self._largest(row.case, self._of_case.get(row.case, ()), name)
        if own is not None:
            return own
        wide: Key = (row.op, "", row.phase, "", "")
        return self._largest(wide, self._of_op.get((row.op, row.phase), ()), name)

    def _largest(self, key: Key, pairs: Sequence[tuple[Row, Row]], name: str) -> float | None:
        if (key, name) not in self._found:
            both = [
                (first.figures[name], again.figures[name])
                for first, again in pairs
                if name in first.figures and name in again.figures
            ]
            self._found[key, name] = max(
                (_distance(x, y, self._seed) for x, y in both if min(x.p05, y.p05) > 0),
                default=None,
            )
        return self._found[key, name]


def _line(first: Row, second: Row, name: str, floors: tuple[Floors, Floors], least: float, seed: int) -> Line:
    a, b = first.figures[name], second.figures[name]
    measured = [one.of(row, name) for one, row in zip(floors, (first, second), strict=True)]
    known = [floor for floor in measured if floor is not None]
    if name != TIME or None in (first.noise_floor, second.noise_floor):
        known = known[:1]
    resident = name == MEMORY and not floors[0].exact_memory
    floor = max([least, *known, *([RESIDENT_FLOOR] if resident else [])])
    ratio = _ratio(a, b, seed)
    grain = RESIDENT_GRAIN if resident else 0.0
    return Line(first, a, b, ratio, floor, bool(known), _change(a, b, ratio, floor, bool(known), grain))


def _drift(lines: Sequence[Line]) -> float | None:
    """By what factor the times of variants that are not ours moved, in the median; None if there are few."""
    moved = [
        line.ratio.estimate
        for line in lines
        if line.a.name in TIMES and line.ratio is not None and not line.row.variant.startswith(OURS)
    ]
    return median([moved]) if len(moved) >= LEAST_DRIFT_TIMES else None


def _widened(line: Line, drift: float) -> Line:
    if line.a.name not in TIMES:
        return line
    floor = line.floor + drift
    change = _change(line.a, line.b, line.ratio, floor, line.measured_floor, 0.0)
    return replace(line, floor=floor, change=change)


def _ratio(a: Figure, b: Figure, seed: int) -> Ratio | None:
    if min(min(run) for one in (a, b) for run in one.runs) <= 0:
        return Ratio(b.p50 / a.p50, b.p50 / a.p50, b.p50 / a.p50) if a.p50 > 0 else None
    if a.n == b.n == 1:
        return Ratio(b.p50 / a.p50, b.p50 / a.p50, b.p50 / a.p50)
    return ratio_of_medians(b.runs, a.runs, seed=seed, resamples=RESAMPLES)


def _distance(first: Figure, again: Figure, seed: int) -> float:
    """As `statistics.noise_floor`; 0 where there is no ratio."""
    ratio = _ratio(again, first, seed)
    return 0.0 if ratio is None else max(abs(ratio.low - 1), abs(ratio.high - 1))


def _change(a: Figure, b: Figure, ratio: Ratio | None, floor: float, measured: bool, grain: float) -> Change:
    """One sample of a time says nothing without an A/A run; sizes and errors don't vary of themselves."""
    if a.name in TIMES and max(a.n, b.n) == 1 and not measured:
        return "unknown"
    if abs(b.p50 - a.p50) < grain:
        return "same"
    if ratio is None:
        said = "same" if a.p50 == b.p50 else "more" if b.p50 > a.p50 else "less"
    else:
        said = ratio.verdict(floor)
    if said not in ("more", "less"):
        return "same"
    return "better" if said == a.better else "worse"


def _untimed(first: Row, second: Row) -> Untimed:
    said = [f"{row.status}: {row.reason}" if row.reason else row.status for row in (first, second)]
    return Untimed(first, *said)


def _notes(a: Results, b: Results, lines: Sequence[Line], drift: float | None) -> Iterator[str]:
    changed = [
        f"{name} {a.versions.get(name) or 'absent'} -> {b.versions.get(name) or 'absent'}"
        for name in dict.fromkeys([*a.versions, *b.versions])
        if a.versions.get(name) != b.versions.get(name)
    ]
    if changed:
        yield f"versions differ: {', '.join(changed)}"
    unmeasured = [line for line in lines if not line.measured_floor and line.a.name in TIMES]
    if unmeasured:
        yield (
            f"{len(unmeasured)} of {len(lines)} figures have no A/A run: their noise floor is the least one, "
            "and what the machine did between the two runs counts as a difference"
        )
    if drift is not None:
        note = f"drift: times of variants that are not qtrain's are {drift:.2f} times A's in the median"
        yield (
            note
            if abs(drift - 1) < SEEN_DRIFT
            else f"{note}: the machine was not the same; see --allow-drift"
        )
