"""The first table: qtrain beside the best of the others, one line for each thing that was measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..compare import LEAST_FLOOR
from ..results import MEMORY, Row
from ..statistics import RESAMPLES, Ratio
from .source import Source, grouped, is_ours, main_of, peers_of, ratio, times
from .text import DASH, median_of
from .text import ratio as ratio_text


@dataclass(frozen=True, slots=True)
class Line:
    """Ours and another; ratios are the other's to ours: above 1 says that ours takes less."""

    what: str
    ours: str
    other: str
    values: str
    ratio: str
    memory: str
    verdict: str
    good: bool | None


def lines(source: Source) -> list[Line]:
    """In the order: training, ops, quantizers."""
    return [*_training(source), *_ops(source), *_quality(source)]


def _training(source: Source) -> Iterator[Line]:
    results = source.of("train")
    for rows in (rows for one in results for rows in grouped(one.rows, lambda row: (row.op, row.dtype))):
        mine = main_of(rows)
        if mine is None:
            continue
        peers = sorted(peers_of(rows), key=_seconds)
        baseline = next((row for row in peers if "default" in row.variant and "TRL" in row.variant), None)
        others = [row for row in peers if row is peers[0] or row is baseline]
        for other in others:
            yield _line(f"{mine.op.upper()} step, {mine.dtype}", mine, other)


def _ops(source: Source) -> Iterator[Line]:
    """Of an op at several shapes: the geometric mean of the ratios, and their range."""

    def key(row: Row) -> tuple[str, ...]:
        base = next((str(value) for name, value in row.shape if name == "base"), "")
        return (row.op, row.dtype, base)

    for rows in (rows for one in source.of("kernels") for rows in grouped(one.rows, key)):
        whole = [row for row in rows if "+" in row.phase] or rows
        cases = grouped(whole, lambda row: (row.phase, row.shape_text))
        found: dict[str, list[tuple[Row, Row]]] = {}
        for case in cases:
            mine = main_of(case)
            for other in peers_of(case):
                if mine is not None:
                    found.setdefault(other.variant, []).append((mine, other))
        complete = [pairs for pairs in found.values() if len(pairs) == max(map(len, found.values()))]
        if not complete:
            continue
        pairs = min(complete, key=lambda pairs: _mean([_seconds(o) / _seconds(m) for m, o in pairs]))
        op, dtype, base = key(pairs[0][0])
        what = ", ".join(part for part in (op, base, dtype, pairs[0][0].phase) if part)
        yield _line(what, *pairs[0]) if len(pairs) == 1 else _range(what, pairs)


def _range(what: str, pairs: Sequence[tuple[Row, Row]]) -> Line:
    found = [ratio(times(other), times(mine)) for mine, other in pairs]
    known = [one for one in found if one is not None]
    estimates = [one.estimate for one in known]
    memory = [
        other.figures[MEMORY].p50 / mine.figures[MEMORY].p50
        for mine, other in pairs
        if MEMORY in mine.figures and MEMORY in other.figures and mine.figures[MEMORY].p50 > 0
    ]
    quicker, slower = sum(one.low > 1 for one in known), sum(one.high < 1 for one in known)
    told = [f"faster in {quicker} of {len(known)}"] if quicker else []
    told += [f"slower in {slower}"] if slower else []
    return Line(
        what,
        pairs[0][0].variant,
        pairs[0][1].variant,
        f"{len(pairs)} shapes",
        f"{_mean(estimates):.2f} ({min(estimates):.2f}–{max(estimates):.2f})",
        f"{_mean(memory):.1f} ({min(memory):.1f}–{max(memory):.1f})" if memory and min(memory) > 0 else DASH,
        ", ".join(told) or "no difference",
        True if quicker and not slower else False if slower and not quicker else None,
    )


def _line(what: str, mine: Row, other: Row) -> Line:
    found = ratio(times(other), times(mine))
    memory = ratio(other.figures.get(MEMORY), mine.figures.get(MEMORY))
    verdict, good = _verdict(found, mine.noise_floor)
    return Line(
        what,
        mine.variant,
        other.variant,
        f"{median_of(times(mine))} / {median_of(times(other))}",
        ratio_text(found),
        DASH if memory is None else f"{memory.estimate:.1f}",
        verdict,
        good,
    )


def _verdict(found: Ratio | None, floor: float | None) -> tuple[str, bool | None]:
    if found is None:
        return DASH, None
    said = found.verdict(max(floor or 0.0, LEAST_FLOOR))
    if said == "no difference":
        return said, None
    return ("faster", True) if said == "more" else ("slower", False)


def _quality(source: Source) -> Iterator[Line]:
    """Loss of a quantised checkpoint: ours beside the best other of the same scheme."""
    rows = [(i, row) for i, one in enumerate(source.results) for row in one.rows if "KL" in row.figures]
    schemes = dict.fromkeys((i, row.dtype, row.shape_text) for i, row in rows)
    for scheme in schemes:
        alike = [row for i, row in rows if (i, row.dtype, row.shape_text) == scheme]
        mine = min((row for row in alike if is_ours(row)), key=_kl, default=None)
        other = min((row for row in alike if not is_ours(row)), key=_kl, default=None)
        if mine is None or other is None:
            continue
        a, b = mine.figures["KL"], other.figures["KL"]
        memory = ratio(other.figures.get(MEMORY), mine.figures.get(MEMORY))
        found = _loss_ratio(mine, other)
        said = None if found is None else found.verdict(LEAST_FLOOR)
        yield Line(
            f"KL to 16 bits: {mine.dtype}, {mine.shape_text}",
            mine.variant,
            other.variant,
            f"{a.p50:.4f} / {b.p50:.4f} nats",
            ratio_text(found),
            DASH if memory is None else f"{memory.estimate:.1f}",
            {"more": "nearer", "less": "farther", None: DASH}.get(said, "no difference"),
            {"more": True, "less": False}.get(said or ""),
        )


def _loss_ratio(mine: Row, other: Row) -> Ratio | None:
    """Mean KL of the other to ours; with a paired bootstrap where both were scored on the same windows."""
    a, b = mine.figures["KL"], other.figures["KL"]
    if a.p50 <= 0:
        return None
    ours, theirs = (np.asarray(row.details.get("KL by window") or ()) for row in (mine, other))
    estimate = b.p50 / a.p50
    if len(ours) != len(theirs) or len(ours) < 2:
        return Ratio(estimate, estimate, estimate)
    chosen = np.random.default_rng(0).integers(len(ours), size=(RESAMPLES, len(ours)))
    low, high = np.percentile(theirs[chosen].mean(axis=1) / ours[chosen].mean(axis=1), [2.5, 97.5])
    return Ratio(float(low), estimate, float(high))


def _kl(row: Row) -> float:
    return row.figures["KL"].p50


def _seconds(row: Row) -> float:
    figure = times(row)
    return math.inf if figure is None else figure.p50


def _mean(values: Sequence[float]) -> float:
    """Geometric."""
    return math.exp(sum(map(math.log, values)) / len(values))
