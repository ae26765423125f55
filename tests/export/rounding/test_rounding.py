"""Rounding of one linear layer, against definitions written out here and in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtrain.export.errors import ExportError
from qtrain.export.formats.scheme import Scheme
from qtrain.export.rounding.cholesky import factor_in_place
from qtrain.export.rounding.correction import corrected_weight, missing_products
from qtrain.export.rounding.curvature import curvature
from qtrain.export.rounding.gram import GramSum
from qtrain.export.rounding.linear import round_linear, round_linears
from tests.export.rounding.problems import gram, inputs, output_error, weight

SYMMETRIC = Scheme(4, 32, symmetric=True)
ASYMMETRIC = Scheme(4, 32, symmetric=False)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "scheme", [SYMMETRIC, ASYMMETRIC, Scheme(4, -1), Scheme(8, 32), Scheme(2, 32)], ids=str
)
def test_feedback_beats_nearest_and_refining_beats_feedback(scheme: Scheme) -> None:
    x, w = inputs(512, 128), weight(48, 128)
    errors = [
        output_error(
            w,
            round_linear(w, curvature(gram(x)), scheme, rounding=rounding, refine=refine).linear.dequantize(),
            x,
        )
        for rounding, refine in (("nearest", 0), ("gptq", 0), ("gptq", 2))
    ]
    # a 2-bit grid is so coarse that feedback saves less; here it saves 20 % or more of every scheme
    assert errors[1] < 0.8 * errors[0]
    assert errors[2] < errors[1]


def test_feedback_is_gptq_as_published() -> None:
    """Frantar et al. 2022, algorithm 1, with the inverse's Cholesky factor, in float64."""
    x, w = inputs(300, 64), weight(16, 64)
    found = round_linear(w, curvature(gram(x), order="off", damp=0.01), SYMMETRIC, refine=0).linear
    h = gram(x).double()
    h.diagonal().add_(0.01 * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    left = w.double().clone()
    scales = found.scales.double()
    for column in range(64):
        scale = scales[:, column // 32]
        q = (left[:, column] / scale).round().add(8).clamp(0, 15)
        # a value that float32 and float64 put on two sides of a tie would differ; none does with this seed
        assert torch.equal(q, found.q[:, column].double()), column
        error = (left[:, column] - (q - 8) * scale) / upper[column, column]
        left[:, column:] -= error[:, None] * upper[column, column:]


def test_refined_integers_are_a_local_minimum_of_the_quadratic_form() -> None:
    """After many sweeps no single integer can be changed for the better, by brute force in float64."""
    x, w = inputs(64, 16), weight(4, 16)
    h = curvature(gram(x), order="off", damp=0.01)
    linear = round_linear(w, h, Scheme(4, 16), refine=30).linear
    full = h.gram.flip(0, 1).double()  # places back to columns
    scales = linear.scales.double()

    def cost(q: torch.Tensor) -> torch.Tensor:
        error = (q - 8) * scales - w.double()
        return ((error @ full) * error).sum(1)

    best = cost(linear.q.double())
    for column, value in itertools.product(range(16), range(16)):
        changed = linear.q.double().clone()
        changed[:, column] = value
        assert bool((cost(changed) >= best * (1 - 1e-5)).all()), (column, value)  # float32 decided the ties


@pytest.mark.parametrize("order", ["static", "off"])
def test_weights_on_the_grid_stay(order: str) -> None:
    generator = torch.Generator().manual_seed(3)
    q = torch.randint(0, 16, (24, 64), generator=generator)
    q[:, ::32] = 0  # the range of every group is used up, so that the scale can be seen in the weights
    scales = (torch.rand(24, 2, generator=generator) + 0.5).half().float() / 64
    w = (q - 8) * scales.repeat_interleave(32, 1)
    rounded = round_linear(w, curvature(gram(inputs(256, 64)), order=order), Scheme(4, 32))  # type: ignore[arg-type]
    assert torch.equal(rounded.linear.dequantize(), w)
    assert rounded.error == 0


def test_static_order_has_trivial_groups_and_full_order_says_its_own() -> None:
    x, w = inputs(256, 64), weight(8, 64)
    static = round_linear(w, curvature(gram(x), order="static"), SYMMETRIC).linear
    assert static.g_idx is None
    scheme = Scheme(4, 32, desc_act=True)
    full = round_linear(w, curvature(gram(x), order="full"), scheme).linear
    assert full.g_idx is not None
    activity = gram(x).diagonal()
    assert set(full.g_idx.tolist()) == {0, 1}
    assert activity[full.g_idx == 0].min() >= activity[full.g_idx == 1].max()
    nearest = round_linear(w, curvature(gram(x)), SYMMETRIC, rounding="nearest").linear
    assert output_error(w, full.dequantize(), x) < output_error(w, nearest.dequantize(), x)


def test_symmetric_scales_take_the_sign_that_uses_all_sixteen_steps() -> None:
    w = torch.tensor([[0.8, -0.1] * 16, [-0.8, 0.1] * 16])
    linear = round_linear(w, curvature(torch.eye(32)), SYMMETRIC, rounding="nearest").linear
    # +0.8 on the lowest step -8: the scale is negative; an error of half a step of 0.1 at most
    assert (linear.scales < 0).flatten().tolist() == [True, False]
    assert float((linear.dequantize() - w).abs().max()) < 1e-3


def test_dead_columns_are_rounded_to_the_nearest() -> None:
    x, w = inputs(256, 64), weight(8, 64)
    x[:, [3, 40]] = 0
    found = curvature(gram(x))
    assert found.dead == 2
    linear = round_linear(w, found, SYMMETRIC, refine=0).linear
    scales = linear.scales.float()
    for column in (3, 40):
        scale = scales[:, column // 32]
        assert torch.equal(linear.q[:, column].float(), (w[:, column] / scale).round().add(8).clamp(0, 15))


def test_inputs_that_are_all_zero_leave_nearest_rounding() -> None:
    w = weight(8, 64)
    zero = round_linear(w, curvature(torch.zeros(64, 64)), SYMMETRIC, refine=0).linear
    even = round_linear(w, curvature(torch.eye(64)), SYMMETRIC, rounding="nearest").linear
    assert torch.equal(zero.dequantize(), even.dequantize())


def test_damping_grows_until_the_gram_matrix_can_be_factored() -> None:
    h = torch.eye(32)
    h[0, 0] = -0.05  # what float32 sums over very many tokens can look like
    found = curvature(h, damp=0.01)
    assert found.damp == pytest.approx(0.1)
    assert bool((found.importance > 0).all())


def test_a_gram_matrix_that_stays_indefinite_is_an_error_that_names_the_module() -> None:
    h = torch.eye(32)
    h[0, 1] = h[1, 0] = 50.0
    with pytest.raises(ExportError, match=r"layers\.3\.mlp\.down_proj.*not positive definite.*--calib"):
        curvature(h, name="model.layers.3.mlp.down_proj")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_an_error_that_names_the_module(value: float) -> None:
    h = torch.eye(32)
    h[5, 5] = value
    with pytest.raises(ExportError, match=r"o_proj.*NaN"):
        curvature(h, name="o_proj")
    w = weight(4, 32)
    w[1, 1] = value
    with pytest.raises(ExportError, match=r"o_proj.*NaN"):
        round_linear(w, curvature(torch.eye(32)), SYMMETRIC, names=["o_proj"])


def test_layers_with_one_input_are_rounded_as_one() -> None:
    x, parts = inputs(256, 64), [weight(8, 64), weight(16, 64, seed=4)]
    h = curvature(gram(x))
    for found, alone in zip(round_linears(parts, h, ASYMMETRIC), parts, strict=True):
        expected = round_linear(alone, h, ASYMMETRIC)
        # products of other shapes are summed in another order, so that a tie may fall to the other side
        assert (found.linear.q != expected.linear.q).float().mean() < 0.02
        assert found.error == pytest.approx(expected.error, rel=0.02)


def test_lowest_zero() -> None:
    w = weight(32, 64).abs()  # all weights positive: the zero is the lowest step
    for lowest in (0, 1):
        linear = round_linear(w, curvature(gram(inputs(256, 64))), ASYMMETRIC, lowest_zero=lowest).linear
        assert linear.zeros is not None
        assert int(linear.zeros.min()) == lowest


def test_corrected_weight_is_the_least_squares_solution() -> None:
    x = inputs(512, 24).double()
    y = x + 0.3 * torch.randn(512, 24, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    w, h = weight(6, 24), (x.t() @ x).float()

    behind = 0.03 * inputs(512, 6, seed=10).double()  # what the residual stream lacks

    def found(strength: float, lag: torch.Tensor | None = None) -> torch.Tensor:
        residual = None if lag is None else (lag.t() @ x).float()
        missing = missing_products({"w": w}, ((y - x).t() @ x).float(), residual)
        return corrected_weight(w, missing["w"], curvature(h.clone(), damp=1e-6), strength)

    expected = torch.linalg.lstsq(x, y @ w.double().t()).solution.t()
    # float32 sums of 512 products; the correction itself is of the order of 0.1
    assert torch.allclose(found(1.0).double(), expected, atol=5e-4)
    assert torch.allclose(found(0.5).double(), (expected + w) / 2, atol=5e-4)
    assert torch.equal(found(0.0), w)
    with_residual = torch.linalg.lstsq(x, behind + y @ w.double().t()).solution.t()
    assert not torch.allclose(with_residual, expected, atol=5e-3)
    # which moves weights by 0.035 in the mean and 0.3 at most
    assert torch.allclose(found(1.0, behind).double(), with_residual, atol=2e-3)


def test_gram_sum_is_the_sum_over_chunks() -> None:
    x, y = inputs(96, 520), inputs(96, 520, seed=5)
    behind = inputs(96, 24, seed=6)
    sums = GramSum(520, drift=True, outputs=24)
    for first in (0, 32, 64):
        part = slice(first, first + 32)
        sums.add(x[part].view(2, 16, 520), y[part].view(2, 16, 520), behind[part].view(2, 16, 24))
    expected = x.double().t() @ x.double()
    # float32 sums of 96 products of numbers up to about 30
    assert torch.allclose(sums.finish().double(), expected, rtol=1e-5, atol=0.02)
    assert torch.equal(sums.gram, sums.gram.t())
    moved = (y.double() - x.double()).t() @ x.double()
    drift, residual_drift = sums.take_drift()
    assert torch.allclose(drift.double(), moved, rtol=1e-5, atol=0.02)
    assert residual_drift is not None
    assert torch.allclose(residual_drift.double(), behind.double().t() @ x.double(), rtol=1e-5, atol=0.02)
    with pytest.raises(ValueError, match="drift is missing"):
        sums.take_drift()
    assert sums.tokens == 96


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 9).map(lambda n: 8 * n),
    groups=st.integers(1, 5),
    length=st.sampled_from([8, 32, -1]),
    bits=st.sampled_from([2, 4, 8]),
    symmetric=st.booleans(),
    order=st.sampled_from(["static", "off", "full"]),
    refine=st.sampled_from([0, 1, 2]),
    lowest_zero=st.sampled_from([0, 1]),
    tokens=st.integers(1, 80),
    seed=st.integers(0, 99),
)
def test_no_shape_is_worse_than_the_nearest_values(
    rows: int,
    groups: int,
    length: int,
    bits: int,
    symmetric: bool,
    order: str,
    refine: int,
    lowest_zero: int,
    tokens: int,
    seed: int,
) -> None:
    """Whatever the shapes, and with fewer tokens than columns too; and all values are a format's."""
    width = groups * (16 if length == -1 else length)
    x, w = inputs(tokens, width, seed), weight(rows, width, seed + 1)
    scheme = Scheme(bits, length, symmetric=symmetric, desc_act=order == "full")
    found = curvature(gram(x), order=order)  # type: ignore[arg-type]
    rounded = round_linear(w, found, scheme, refine=refine, lowest_zero=lowest_zero)
    nearest = round_linear(w, found, scheme, rounding="nearest", lowest_zero=lowest_zero)
    assert rounded.error <= nearest.error * 1.0001 + 1e-12
    linear = rounded.linear
    assert linear.q.shape == (rows, width)
    assert linear.scheme == scheme
    assert int(linear.q.max()) <= scheme.top
    assert bool((linear.scales != 0).all())
    if linear.zeros is not None:
        assert int(linear.zeros.min()) >= lowest_zero
    if linear.g_idx is not None:  # every group has its columns, all of one length
        assert torch.bincount(linear.g_idx).tolist() == [width // scheme.groups(width)] * scheme.groups(width)
    # the error that is told is that of the values that are stored
    placed = (linear.dequantize() - w)[:, found.columns].double()
    told = rounded.error * float(
        ((w[:, found.columns].double() @ found.gram.double()) * w[:, found.columns]).sum()
    )
    # float32 sums of the error, which is small beside the terms at 8 bits
    assert float(((placed @ found.gram.double()) * placed).sum()) == pytest.approx(told, rel=0.01, abs=1e-6)


def test_rows_are_rounded_alike_however_many_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    w, h = weight(48, 64), curvature(gram(inputs(256, 64)))
    whole = round_linear(w, h, SYMMETRIC).linear
    monkeypatch.setattr("qtrain.export.rounding.linear.AT_ONCE", 64 * 16)
    parts = round_linear(w, h, SYMMETRIC).linear
    # products of other shapes are summed in another order, so that a tie may fall to the other side
    assert (parts.q != whole.q).float().mean() < 0.02


@pytest.mark.parametrize("width", [40, 96, 100])
def test_factoring_panel_by_panel_is_lapacks(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SMALL", 32), ("PANEL", 16), ("STRIP", 24)):
        monkeypatch.setattr(f"qtrain.export.rounding.cholesky.{name}", value)
    h = gram(inputs(3 * width, width))
    factor = h.clone()
    factor[1:, 0] = float("nan")  # the lower triangle is not looked at
    assert factor_in_place(factor)
    expected = torch.linalg.cholesky(h.double(), upper=True)
    # float32 with a condition number of about 1e4
    assert torch.allclose(factor.double(), expected, rtol=1e-3, atol=1e-3)
    assert bool((factor.tril(-1) == 0).all())
    h[width - 3, width - 3] *= -1
    assert not factor_in_place(h)
