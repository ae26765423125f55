"""Bootstrap intervals over held-out rows: of a mean, and of the paired difference of two subjects.

    statistic = sum_i v_i / sum_i w_i      over rows i drawn with replacement

w = 1 gives a score, v = NLL and w = tokens the loss. A difference draws the same rows for both
subjects, so that what makes a row hard cancels (Efron & Tibshirani 1993, sections 13.3 and 16.4).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]

RESAMPLES = 10_000
LEVEL = 0.95
MIN_ROWS = 8  # with fewer rows, resampling them says little about others: no verdict
_CHUNK = 500  # resamples at once, so that memory stays small for many rows


@dataclass(frozen=True, slots=True)
class Interval:
    """A statistic and its percentile interval at `LEVEL`."""

    mean: float
    low: float
    high: float
    rows: int


def mean_interval(
    values: Sequence[float], weights: Sequence[float] | None = None, *, seed: int = 0
) -> Interval:
    """sum(values) / sum(weights) with its interval; weights are 1 by default and must be > 0.

    Where all rows passed, or none (every value 1 or every value 0, no weights), resampling can only
    repeat that, so the open side is the exact binomial bound instead: 1 - 0.025^(1/n) from the end.

    Raises:
        ValueError: no rows, or lengths that differ.
    """
    v, w = _checked(values, weights)
    mean, n = float(v.sum() / w.sum()), len(v)
    if weights is None and (np.all(v == 0) or np.all(v == 1)):
        reach = 1 - ((1 - LEVEL) / 2) ** (1 / n)
        return Interval(mean, 0.0, reach, n) if mean == 0 else Interval(mean, 1 - reach, 1.0, n)
    return _interval(mean, np.concatenate([(c @ v) / (c @ w) for c in _counts(n, seed)]), n)


def difference_interval(
    first: Sequence[float], second: Sequence[float], weights: Sequence[float] | None = None, *, seed: int = 0
) -> Interval:
    """statistic(second) - statistic(first) over the same rows, with its interval.

    Raises:
        ValueError: no rows, or lengths that differ.
    """
    a, w = _checked(first, weights)
    b, _ = _checked(second, weights)
    if len(a) != len(b):
        raise ValueError(f"a paired difference needs the same rows, got {len(a)} and {len(b)}")
    delta, n = b - a, len(a)
    draws = np.concatenate([(c @ delta) / (c @ w) for c in _counts(n, seed)])
    return _interval(float(delta.sum() / w.sum()), draws, n)


def verdict(difference: Interval, *, higher_is_better: bool = True) -> str:
    """`better`, `worse`, `no difference` (the interval holds 0), or `too few rows`."""
    if difference.rows < MIN_ROWS:
        return "too few rows"
    if difference.low <= 0 <= difference.high:
        return "no difference"
    return "better" if (difference.low > 0) == higher_is_better else "worse"


def _checked(values: Sequence[float], weights: Sequence[float] | None) -> tuple[Floats, Floats]:
    v = np.asarray(values, dtype=np.float64)
    w = np.ones_like(v) if weights is None else np.asarray(weights, dtype=np.float64)
    if v.size == 0:
        raise ValueError("no rows to resample")
    if v.shape != w.shape:
        raise ValueError(f"{v.size} values and {w.size} weights")
    return v, w


def _counts(rows: int, seed: int) -> Iterator[Floats]:
    """How often each row is drawn, [_CHUNK, rows] at a time; the same for every call with this seed."""
    generator = np.random.default_rng(seed)
    for _ in range(RESAMPLES // _CHUNK):
        yield generator.multinomial(rows, np.full(rows, 1 / rows), size=_CHUNK).astype(np.float64)


def _interval(mean: float, draws: Floats, rows: int) -> Interval:
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean, float(low), float(high), rows)
