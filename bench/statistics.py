"""Medians, and how sure a ratio of two of them is.

Samples come in runs (processes): those of one run share its luck, so the bootstrap draws runs first and
then samples within them. Sources: Efron & Tibshirani 1993, ch. 13 (percentile interval); Davison &
Hinkley 1997, 3.8 (resampling of nested data).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Runs = Sequence[Sequence[float]]

RESAMPLES = 4000


@dataclass(frozen=True, slots=True)
class Ratio:
    """An estimated ratio with its 95 % interval."""

    low: float
    estimate: float
    high: float

    def verdict(self, noise_floor: float = 0.0) -> str:
        """`more`, `less`, or `no difference`: the interval must clear 1 by more than the noise floor.

        `noise_floor` is how far from 1 the ratio of a variant with itself was found to be.
        """
        if self.low > 1 + noise_floor:
            return "more"
        if self.high < 1 - noise_floor:
            return "less"
        return "no difference"


def pooled(runs: Runs) -> list[float]:
    """All samples of all runs.

    Raises:
        ValueError: there are none.
    """
    samples = [sample for run in runs for sample in run]
    if not samples:
        raise ValueError("no samples")
    return samples


def percentile(runs: Runs, percent: float) -> float:
    """Of the pooled samples, interpolated linearly; `percent` in [0, 100]."""
    return float(np.percentile(pooled(runs), percent))


def median(runs: Runs) -> float:
    """Of the pooled samples."""
    return percentile(runs, 50)


def ratio_of_medians(
    numerator: Runs, denominator: Runs, *, seed: int = 0, resamples: int = RESAMPLES
) -> Ratio:
    """median(numerator) / median(denominator), with a 95 % nested-bootstrap interval.

    Raises:
        ValueError: one side has no samples, or a sample that is not > 0.
    """
    for runs in (numerator, denominator):
        if min(pooled(runs)) <= 0:
            raise ValueError("a ratio of medians needs samples > 0")
    draw = np.random.default_rng(seed)
    ratios: Any
    if len(numerator) == len(denominator) == 1:  # nothing is nested: all at once
        ratios = _resampled_medians(numerator[0], draw, resamples)
        ratios /= _resampled_medians(denominator[0], draw, resamples)
    else:
        ratios = [
            _resampled_median(numerator, draw) / _resampled_median(denominator, draw)
            for _ in range(resamples)
        ]
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Ratio(float(low), median(numerator) / median(denominator), float(high))


def noise_floor(first: Runs, again: Runs, *, seed: int = 0) -> float:
    """How far from 1 the ratio of a variant with itself may be: the farther end of its interval."""
    ratio = ratio_of_medians(first, again, seed=seed)
    return max(abs(ratio.low - 1), abs(ratio.high - 1))


def _resampled_medians(samples: Sequence[float], draw: np.random.Generator, resamples: int) -> Any:
    chosen = draw.integers(len(samples), size=(resamples, len(samples)))
    return np.median(np.asarray(samples, np.float64)[chosen], axis=1)


def _resampled_median(runs: Runs, draw: np.random.Generator) -> float:
    filled = [run for run in runs if run]
    chosen = draw.integers(len(filled), size=len(filled))
    parts = [np.asarray(filled[i])[draw.integers(len(filled[i]), size=len(filled[i]))] for i in chosen]
    return float(np.median(np.concatenate(parts)))
