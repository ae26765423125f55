"""float64 rounds once, where PyTorch's own cast rounds twice."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtrain.export.rounded import round_once

NARROW = [torch.bfloat16, torch.float16]


def test_a_value_beside_a_tie() -> None:
    beside = torch.tensor([1 + 2**-8 + 2**-40, 1 + 2**-8, 1 + 2**-8 - 2**-40, -(1 + 2**-8 + 2**-40)]).double()
    beside = torch.tensor(
        [1 + 2**-8 + 2**-40, 1 + 2**-8, 1 + 2**-8 - 2**-40, -1 - 2**-8 - 2**-40], dtype=torch.float64
    )
    up = 1 + 2**-7
    assert round_once(beside, torch.bfloat16).tolist() == [up, 1, 1, -up]
    assert beside.to(torch.bfloat16).tolist() == [1, 1, 1, -1]  # by way of float32: the tie, then to even


@settings(max_examples=300, deadline=None)
@given(
    st.floats(allow_nan=False, allow_infinity=False, width=32), st.sampled_from(NARROW), st.integers(-3, 3)
)
def test_nearest_with_ties_to_even(value: float, dtype: torch.dtype, nudge: int) -> None:
    """Values of the dtype, midpoints between them, and neighbours of both a hair away, against fractions."""
    low = torch.tensor(value).to(dtype)
    if not bool(torch.isfinite(low)):
        return
    high = torch.nextafter(low, torch.tensor(math.inf, dtype=dtype))
    if not bool(torch.isfinite(high)):
        return
    middle = (Fraction(low.item()) + Fraction(high.item())) / 2
    x = float(middle)
    for _ in range(abs(nudge)):
        x = math.nextafter(x, math.inf if nudge > 0 else -math.inf)
    got = round_once(torch.tensor([x], dtype=torch.float64), dtype)
    exact = Fraction(x)
    if exact == middle:
        even = [v for v in (low, high) if int(v.view(torch.int16)) % 2 == 0]
        assert got.item() == even[0].item()
    else:
        assert got.item() == (low if exact < middle else high).item()


def test_random_values_are_at_most_half_a_unit_away() -> None:
    values = torch.randn(100_000, dtype=torch.float64)
    for dtype in NARROW:
        got = round_once(values, dtype)
        error = (got.double() - values).abs()
        for other in (torch.nextafter(got, torch.tensor(big, dtype=dtype)) for big in (math.inf, -math.inf)):
            assert bool((error <= (other.double() - values).abs()).all())


def test_what_needs_no_rounding_and_what_is_too_large() -> None:
    values = torch.tensor([0.0, -0.0, 1.5, 65504.0, 65520.0, -1e300, math.inf], dtype=torch.float64)
    assert round_once(values, torch.float32).tolist() == [0, 0, 1.5, 65504, 65520, -math.inf, math.inf]
    half = round_once(values[:5], torch.float16)
    assert half.tolist() == [0, 0, 1.5, 65504, math.inf]
    assert math.copysign(1, half[1].item()) == -1
    small = torch.tensor([2.0**-25, 2.0**-25 * (1 + 2.0**-50)], dtype=torch.float64)  # half the least fp16
    assert round_once(small, torch.float16).tolist() == [0, 2.0**-24]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_dtypes_are_a_plain_cast(dtype: torch.dtype) -> None:
    values = torch.randn(1000, dtype=torch.float64)
    assert torch.equal(round_once(values, dtype), values.to(dtype))
