"""lora_linear's PyTorch path against its float64 definition: values, gradients, dropout, dispatch."""

from __future__ import annotations

import gc
import weakref
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qtrain.kernels import lora_linear, lora_linear_group, lora_torch, nf4_dequantize
from tests.kernels.lora_cases import Case, assert_no_less_exact, exact, make_case, nf4_weight, run
from tests.kernels.poison import poison_empty


def keep_mask(seed: int, rows: int, columns: int, dropout_p: float, dtype: torch.dtype) -> Tensor:
    """The mask as the op shows it: with W = 0 and A = B = 1 the output is drop(x)."""
    one = torch.eye(columns)
    zero = torch.zeros(columns, columns, dtype=dtype)
    x = torch.ones(rows, columns, dtype=dtype)
    return lora_linear(x, zero, one, one, 1.0, dropout_p=dropout_p, seed=seed) != 0


class CpuCase(Case):
    """A case under the PyTorch path's own mask."""

    def keep(self) -> Tensor:
        if self.dropout_p == 0:
            return torch.ones(self.x.shape, dtype=torch.bool)
        return keep_mask(self.seed, *self.x.shape, self.dropout_p, self.x.dtype)


def cpu_case(*args: Any, **kwargs: Any) -> CpuCase:
    case = make_case(*args, **kwargs)
    return CpuCase(**{field.name: getattr(case, field.name) for field in fields(case)})


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of the mask, the last of them ragged; memory is NaN until it is written."""
    monkeypatch.setattr(lora_torch, "MASK_ELEMENTS", 1000)
    poison_empty(monkeypatch)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 70),
    columns=st.lists(st.integers(1, 90), min_size=1, max_size=3),
    inner=st.integers(1, 60).map(lambda half: 2 * half),
    rank=st.integers(1, 40),
    base=st.sampled_from(["nf4 nested", "nf4", "16-bit"]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    dropout_p=st.sampled_from([0.0, 0.05, 0.5]),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_no_less_exact_than_plain_products(
    rows: int,
    columns: list[int],
    inner: int,
    rank: int,
    base: str,
    dtype: torch.dtype,
    dropout_p: float,
    bias: bool,
    seed: int,
) -> None:
    """Values and gradients; groups of up to three layers, whose ranks differ."""
    case = cpu_case(
        rows,
        columns,
        inner,
        [rank + index for index in range(len(columns))],
        base=base,
        dtype=dtype,
        dropout_p=dropout_p,
        bias=bias,
        seed=seed,
    )
    # rounded once more than plain products: the scaled B, xa and g, and the sum of dx for each layer
    assert_no_less_exact(case, run(case), 3 + len(columns))


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck(dropout_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # gradcheck's own buffers come from torch.empty
    case = make_case(7, [5, 3], 8, [2, 4], base="nf4", dtype=torch.float32)
    x = case.x.double().requires_grad_()
    factors = [f.double().requires_grad_() for f in (*case.lora_As, *case.lora_Bs)]
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def group(x: Tensor, bias: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        return lora_linear_group(
            x,
            case.weights,
            factors[:2],
            factors[2:],
            [0.5, 3.0],
            biases=[bias, None],
            dropout_p=dropout_p,
            seed=3,
        )

    assert torch.autograd.gradcheck(group, (x, bias, *factors))


def test_float64_equals_the_definition() -> None:
    """Only the order of additions differs."""
    case = cpu_case(33, [20, 6], 24, [4, 7], base="16-bit", dtype=torch.float64, dropout_p=0.3)
    wide = {name: [f.double() for f in getattr(case, name)] for name in ("lora_As", "lora_Bs")}
    case = replace(case, **wide)
    true = exact(case)
    for name, value in run(case).items():
        torch.testing.assert_close(
            value, true[name], rtol=1e-11, atol=1e-11, msg=lambda t, n=name: f"{n}: {t}"
        )


def test_a_group_is_its_layers() -> None:
    case = make_case(19, [20, 12, 12], 16, [4, 7, 1], base="nf4", dtype=torch.float32)
    group = lora_linear_group(
        case.x, case.weights, case.lora_As, case.lora_Bs, case.scalings, biases=case.biases
    )
    for index, y in enumerate(group):
        alone = lora_linear(
            case.x,
            case.weights[index],
            case.lora_As[index],
            case.lora_Bs[index],
            case.scalings[index],
            bias=case.biases[index],
        )
        # products of other widths may add up in another order
        torch.testing.assert_close(y, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_mask_in_forward_and_backward(dtype: torch.dtype) -> None:
    """W = 0, A = B = 1: y = drop(x), dx = drop(dy), dA = dy^T drop(x)."""
    rows, columns, p = 90, 64, 0.3
    one = torch.eye(columns).requires_grad_()
    zero = torch.zeros(columns, columns, dtype=dtype)
    x = (torch.rand(rows, columns) + 1).to(dtype).requires_grad_()
    dy = (torch.rand(rows, columns) + 1).to(dtype)
    y = lora_linear(x, zero, one, torch.eye(columns), 1.0, dropout_p=p, seed=7)
    dx, dA = torch.autograd.grad(y, [x, one], dy)
    assert torch.equal(y != 0, dx != 0)
    assert torch.equal(y != 0, keep_mask(7, rows, columns, p, torch.float64))  # whatever the dtype
    # x / (1 - p): A / (1 - p) and the product are rounded, each once
    torch.testing.assert_close(y[y != 0], (x / (1 - p))[y != 0], rtol=2 * torch.finfo(dtype).eps, atol=0)
    expected = dy.double().T @ (x.double() * (y != 0) / (1 - p))
    torch.testing.assert_close(dA.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_dropout_drops_what_was_asked_for_and_independently() -> None:
    for p in (0.05, 0.5, 0.93):
        keep = keep_mask(11, 500, 400, p, torch.float32).double()
        # 5 standard deviations of a binomial share of 200,000, and of its neighbours' correlation
        assert keep.mean().item() == pytest.approx(1 - p, abs=5 * (p * (1 - p) / 200_000) ** 0.5)
        centred = (keep - keep.mean()) / keep.std()
        for neighbour in (centred.roll(1, 1), centred.roll(1, 0), centred.flip(0)):
            assert abs((centred * neighbour).mean().item()) < 5 / 200_000**0.5 * 2
    assert not torch.equal(keep_mask(1, 50, 40, 0.5, torch.float32), keep_mask(2, 50, 40, 0.5, torch.float32))


def test_seed_comes_from_the_default_generator() -> None:
    case = make_case(9, [8], 16, [4], base="16-bit", dtype=torch.float32)

    def output() -> Tensor:
        return lora_linear(case.x, case.weights[0], case.lora_As[0], case.lora_Bs[0], 1.0, dropout_p=0.5)

    torch.manual_seed(5)
    first, second = output(), output()
    torch.manual_seed(5)
    assert torch.equal(first, output())
    assert not torch.equal(first, second)
    before = torch.get_rng_state()
    lora_linear(case.x, case.weights[0], case.lora_As[0], case.lora_Bs[0], 1.0)
    assert torch.equal(before, torch.get_rng_state())  # nothing is drawn where nothing is dropped


def test_only_what_needs_a_gradient_is_computed_and_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(9, [8], 16, [4], base="nf4", dtype=torch.float32)
    called: list[str] = []
    for name in ("input_grad", "weight_grads", "both_grads"):
        plain = getattr(lora_torch, name)
        monkeypatch.setattr(
            lora_torch, name, lambda *a, _n=name, _f=plain, **k: called.append(_n) or _f(*a, **k)
        )

    def backward(need_x: bool, need_factors: bool) -> tuple[Any, ...]:
        called.clear()
        x = case.x.clone().requires_grad_(need_x)
        a, b = (f.clone().requires_grad_(need_factors) for f in (case.lora_As[0], case.lora_Bs[0]))
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = lora_linear(x, case.weights[0], a, b, 1.0)
        y.sum().backward()
        return x.grad is not None, a.grad is not None, list(called), {t.shape for t in saved}

    assert backward(True, False)[:3] == (True, False, ["input_grad"])
    assert (9, 16) not in backward(True, False)[3]  # x itself is not kept for a frozen adapter
    assert backward(False, True)[:3] == (False, True, ["weight_grads"])
    assert (9, 16) in backward(False, True)[3]
    assert torch.Size([8, 16]) not in backward(True, True)[3]  # and a decoded weight never


def test_a_trained_weight_or_layer_left_out() -> None:
    case = make_case(9, [8, 6], 16, [4, 3], base="16-bit", dtype=torch.float32)
    x = case.x.clone().requires_grad_()
    factors = [f.clone().requires_grad_() for f in (*case.lora_As, *case.lora_Bs)]
    ys = lora_linear_group(x, case.weights, factors[:2], factors[2:], [1.0, 2.0])
    ys[1].sum().backward()  # the first layer's output goes nowhere
    alone = [f.detach().clone().requires_grad_() for f in (x, factors[1], factors[3])]
    lora_linear(alone[0], case.weights[1], alone[1], alone[2], 2.0).sum().backward()
    # the order of additions may differ
    torch.testing.assert_close(x.grad, alone[0].grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(factors[1].grad, alone[1].grad, rtol=1e-5, atol=1e-5)
    assert factors[0].grad is None or not factors[0].grad.any()


def test_nothing_outlives_the_graph() -> None:
    case = make_case(9, [8], 16, [4], base="nf4", dtype=torch.float32, dropout_p=0.1)
    x = case.x.clone().requires_grad_()
    y = lora_linear(x, case.weights[0], case.lora_As[0].requires_grad_(), case.lora_Bs[0], 1.0, dropout_p=0.1)
    kept = weakref.ref(x)
    y.sum().backward()
    del x, y
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("base", ["16-bit", "nf4 nested"])
def test_autocast_as_in_a_linear_layer(base: str) -> None:
    case = make_case(9, [8], 16, [4], base=base, dtype=torch.float32)
    weight = case.weights[0]
    dense = weight if isinstance(weight, Tensor) else nf4_dequantize(weight, torch.bfloat16)
    x = case.x.clone().requires_grad_()
    a, b = case.lora_As[0].clone().requires_grad_(), case.lora_Bs[0].clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        linear = torch.nn.functional.linear(x, dense, case.biases[0])
        y = lora_linear(x, weight, a, b, 2.0, bias=case.biases[0])
        zero = lora_linear(x, weight, a, torch.zeros_like(b), 2.0, bias=case.biases[0])
    assert y.dtype == linear.dtype == torch.bfloat16
    assert torch.equal(zero, linear)
    y.sum().backward()
    assert (x.grad.dtype, a.grad.dtype, b.grad.dtype) == (torch.float32,) * 3
    by_hand = lora_linear(
        case.x.bfloat16(), dense.bfloat16(), a.detach(), b.detach(), 2.0, bias=case.biases[0]
    )
    assert torch.equal(y, by_hand)


def test_strided_inputs_and_leading_dimensions() -> None:
    case = make_case(24, [8], 16, [4], base="nf4", dtype=torch.float32)
    weight, a, b = case.weights[0], case.lora_As[0], case.lora_Bs[0]
    plain = lora_linear(case.x, weight, a, b, 2.0)
    wide = torch.randn(24, 40)
    wide[:, 3:35:2] = case.x
    x = wide[:, 3:35:2].requires_grad_()
    strided = lora_linear(x, weight, a, b, 2.0)
    assert torch.equal(plain, strided)
    assert torch.equal(plain.view(2, 3, 4, 8), lora_linear(case.x.view(2, 3, 4, 16), weight, a, b, 2.0))
    # a matrix of one row is multiplied by another routine, which adds up in another order
    torch.testing.assert_close(plain[0], lora_linear(case.x[0], weight, a, b, 2.0))
    strided.T.sum(0).backward(torch.ones(24))  # a gradient that is not contiguous
    torch.testing.assert_close(x.grad, torch.autograd.grad(lora_linear(x, weight, a, b, 2.0).sum(), x)[0])


def test_no_rows_give_zero_gradients() -> None:
    case = make_case(0, [8], 16, [4], base="nf4", dtype=torch.bfloat16, dropout_p=0.2)
    found = run(case)
    assert found["y[0]"].shape == (0, 8)
    assert found["dA[0]"].shape == (4, 16)
    assert not found["dA[0]"].any()
    assert not found["dB[0]"].any()


def test_mistakes_are_named() -> None:
    case = make_case(9, [8], 16, [4], base="16-bit", dtype=torch.float32)
    x, weight, a, b = case.x, case.weights[0], case.lora_As[0], case.lora_Bs[0]
    assert isinstance(weight, Tensor)
    for arguments, options, words in (
        ((x[:, :5], weight, a, b, 1.0), {}, r"x \(9, 5\) and weight \(8, 16\)"),
        ((x, weight, a[:, :5], b, 1.0), {}, r"lora_A \(4, 5\) must be \[r, 16\]"),
        ((x, weight, a, b.T, 1.0), {}, r"lora_B \(4, 8\) must be \(8, 4\)"),
        ((x, weight, a, b, 1.0), {"bias": torch.zeros(3)}, r"bias \(3,\) must be \[8\]"),
        ((x, weight.bfloat16(), a, b, 1.0), {}, "weight is torch.bfloat16, must be torch.float32"),
        ((x, weight.clone().requires_grad_(), a, b, 1.0), {}, "weight requires a gradient"),
        ((x, weight, a, b, 1.0), {"dropout_p": 1.0}, r"dropout_p is 1.0, must be in \[0, 1\)"),
        ((x, weight, a, b, 1.0), {"dropout_p": 0.1, "seed": -1}, "seed is -1"),
    ):
        with pytest.raises(ValueError, match=words):
            lora_linear(*arguments, **options)
    with pytest.raises(ValueError, match=r"lora_As has 2 entries for 1 weights"):
        lora_linear_group(x, [weight], [a, a], [b], [1.0])
    with pytest.raises(ValueError, match=r"lora_B\[1\] \(4, 8\)"):
        lora_linear_group(x, [weight, weight], [a, a], [b, b.T], [1.0, 1.0])


@pytest.mark.parametrize("base", ["16-bit", "nf4", "nf4 nested"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_opcheck(base: str, dropout_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    from qtrain.kernels.lora_op import flatten

    case = make_case(6, [8, 4], 16, [4, 2], base=base, dtype=torch.float32)
    tensors, layout = [], []
    for weight, bias in zip(case.weights, case.biases, strict=True):
        more, sizes = flatten(weight, bias)
        tensors += more
        layout += sizes
    seed = torch.tensor(3) if dropout_p else None
    torch.library.opcheck(
        torch.ops.qtrain.lora_linear_group.default,
        (
            case.x.requires_grad_(),
            tensors,
            layout,
            [a.requires_grad_() for a in case.lora_As],
            [b.requires_grad_() for b in case.lora_Bs],
            case.scalings,
            dropout_p,
            seed,
            False,
        ),
    )


def test_compiles_without_graph_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    weight = nf4_weight(8, 16, nested=True, generator=torch.Generator().manual_seed(0))
    case = make_case(6, [8], 16, [4], base="16-bit", dtype=torch.float32)

    def both(x: Tensor, a: Tensor, b: Tensor, seed: int) -> Tensor:
        y, z = lora_linear_group(x, [weight, case.weights[0]], [a, a], [b, b], [1.0, 2.0])
        return y * z + lora_linear(x, weight, a, b, 1.0, dropout_p=0.5, seed=seed)

    compiled = torch.compile(both, fullgraph=True)
    arguments = [t.clone().requires_grad_() for t in (case.x, case.lora_As[0], case.lora_Bs[0])]
    eager = both(*arguments, seed=4)
    fast = compiled(*arguments, seed=4)
    # the same op on both sides; what stands around it may be fused
    torch.testing.assert_close(fast, eager, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(
        torch.autograd.grad(fast.sum(), arguments), torch.autograd.grad(eager.sum(), arguments), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    drawn = torch.compile(lambda x, a, b: lora_linear(x, weight, a, b, 1.0, dropout_p=0.5), fullgraph=True)
    assert not torch.equal(drawn(*arguments), drawn(*arguments))
