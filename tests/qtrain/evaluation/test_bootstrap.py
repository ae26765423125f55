import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtrain.evaluation.bootstrap import Interval, difference_interval, mean_interval, verdict

scores = st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=40)


def test_interval_is_the_normal_one_for_many_rows():
    values = np.random.default_rng(3).normal(5.0, 2.0, size=400)
    found = mean_interval(values.tolist())
    half = 1.96 * values.std() / math.sqrt(400)
    assert found.mean == pytest.approx(values.mean())
    # 10,000 resamples know the 2.5 % quantile to about 2.5 % of the half-width; 8 % is three times that
    assert found.low == pytest.approx(values.mean() - half, abs=0.08 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.08 * half)


def test_weighted_mean_is_the_loss_per_token():
    found = mean_interval([10.0, 1.0], [10.0, 2.0])
    assert found.mean == pytest.approx(11 / 12)
    assert found.low == pytest.approx(0.5)
    assert found.high == pytest.approx(1.0)


@given(scores)
@settings(max_examples=15, deadline=None)
def test_interval_holds_the_mean(values):
    found = mean_interval(values)
    assert found.low <= found.mean <= found.high
    assert found.low >= 0
    assert found.high <= 1


@given(scores, st.randoms(use_true_random=False))
@settings(max_examples=15, deadline=None)
def test_difference_is_antisymmetric(values, random):
    other = random.sample(values, len(values))
    there, back = difference_interval(values, other), difference_interval(other, values)
    assert there.mean == pytest.approx(-back.mean)
    assert there.low == pytest.approx(-back.high)


def test_all_rows_passed_is_not_certainty():
    found = mean_interval([1.0] * 48)
    assert found.low == pytest.approx(0.025 ** (1 / 48))  # Clopper-Pearson's bound
    assert found.high == 1.0
    assert mean_interval([0.0] * 48).high == pytest.approx(1 - 0.025 ** (1 / 48))


def test_pairing_finds_a_small_steady_difference():
    hard = np.random.default_rng(0).normal(0.0, 10.0, size=60)
    found = difference_interval(hard.tolist(), (hard - 0.1).tolist())
    assert (found.low, found.high) == (pytest.approx(-0.1), pytest.approx(-0.1))
    assert verdict(found) == "worse"
    assert verdict(found, higher_is_better=False) == "better"
    assert mean_interval(hard.tolist()).high - mean_interval(hard.tolist()).low > 4  # hidden without pairing


@pytest.mark.parametrize(
    ("interval", "word"),
    [
        (Interval(0.2, 0.1, 0.3, 48), "better"),
        (Interval(-0.2, -0.3, -0.1, 48), "worse"),
        (Interval(0.1, 0.0, 0.2, 48), "no difference"),
        (Interval(0.0, 0.0, 0.0, 48), "no difference"),
        (Interval(1.0, 1.0, 1.0, 3), "too few rows"),
    ],
)
def test_verdict(interval, word):
    assert verdict(interval) == word


def test_same_seed_same_interval():
    values = np.random.default_rng(1).normal(size=30).tolist()
    assert mean_interval(values) == mean_interval(values)
    assert mean_interval(values, seed=1) != mean_interval(values, seed=2)


def test_errors():
    with pytest.raises(ValueError, match="no rows"):
        mean_interval([])
    with pytest.raises(ValueError, match="same rows"):
        difference_interval([1.0], [1.0, 0.0])
    with pytest.raises(ValueError, match="weights"):
        mean_interval([1.0], [1.0, 1.0])
