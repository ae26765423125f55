"""Ratios of medians: exact values, coverage of the interval, and the verdict."""

from __future__ import annotations

import numpy as np
import pytest

from qtrain.bench.statistics import Ratio, median, noise_floor, percentile, ratio_of_medians


def test_pooled_percentiles() -> None:
    runs = [[1.0, 2.0], [3.0], [4.0, 5.0]]
    assert median(runs) == 3.0
    assert percentile(runs, 0) == 1.0
    assert percentile(runs, 95) == pytest.approx(4.8)


def test_ratio_of_constant_samples_is_exact() -> None:
    assert ratio_of_medians([[6.0, 6.0]], [[2.0], [2.0]]) == Ratio(3.0, 3.0, 3.0)


def test_same_seed_same_interval() -> None:
    runs = [[1.0, 1.2, 0.9], [1.1, 1.3, 1.0]]
    assert ratio_of_medians(runs, runs, seed=5) == ratio_of_medians(runs, runs, seed=5)
    assert ratio_of_medians(runs, runs, seed=5) != ratio_of_medians(runs, runs, seed=6)


def test_interval_covers_the_true_ratio() -> None:
    """A 95 % interval misses 2 of 40 on average; more than 8 would be less than 80 % coverage."""
    draw = np.random.default_rng(0)
    missed = 0
    for trial in range(40):
        first = (2 * draw.lognormal(sigma=0.1, size=(10, 6))).tolist()
        second = draw.lognormal(sigma=0.1, size=(10, 6)).tolist()
        ratio = ratio_of_medians(first, second, seed=trial, resamples=150)
        missed += not ratio.low <= 2 <= ratio.high
    assert missed <= 8


def test_runs_that_differ_widen_the_interval() -> None:
    """Twelve equal-looking samples say less when they are two runs with luck of their own."""
    low, high = [1.0, 1.01, 1.02, 1.0, 1.01, 1.02], [1.5, 1.51, 1.52, 1.5, 1.51, 1.52]
    other = [[1.0] * 6, [1.0] * 6]
    nested = ratio_of_medians([low, high], other)
    mixed = ratio_of_medians([[sample] for sample in low + high], other)
    assert nested.high == pytest.approx(1.515, abs=0.01)
    assert nested.low == pytest.approx(1.005, abs=0.01)
    assert mixed.high - mixed.low <= nested.high - nested.low


@pytest.mark.parametrize(("runs", "match"), [([], "no samples"), ([[]], "no samples"), ([[1.0, 0.0]], "> 0")])
def test_unusable_samples_are_refused(runs: list[list[float]], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ratio_of_medians(runs, [[1.0]])


@pytest.mark.parametrize(
    ("ratio", "floor", "verdict"),
    [
        (Ratio(1.2, 1.3, 1.4), 0.0, "more"),
        (Ratio(1.2, 1.3, 1.4), 0.25, "no difference"),
        (Ratio(0.9, 1.0, 1.1), 0.0, "no difference"),
        (Ratio(0.5, 0.6, 0.7), 0.1, "less"),
        (Ratio(0.5, 0.6, 0.95), 0.1, "no difference"),
    ],
)
def test_verdict_needs_more_than_the_noise(ratio: Ratio, floor: float, verdict: str) -> None:
    assert ratio.verdict(floor) == verdict


def test_noise_floor_of_a_variant_with_itself() -> None:
    assert noise_floor([[2.0, 2.0]], [[2.0, 2.0]]) == 0.0
    assert noise_floor([[1.0]], [[2.0]]) == 0.5
