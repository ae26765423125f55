"""linear_logprob as an operator: registration, torch.compile, autocast, strides, the choice of a backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qtrain.kernels import force_backend, linear_logprob
from qtrain.kernels.logprob import choose_backend


def _case(
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(11, 16, generator=generator).to(dtype)
    w = torch.randn(70, 16, generator=generator).to(dtype)
    bias = torch.randn(70, generator=generator).to(dtype)
    labels = torch.randint(0, 70, (11,), generator=generator)
    labels[3:5] = -100
    return h, w, bias, labels


@pytest.mark.parametrize("trainable_head", [False, True])
def test_opcheck(trainable_head: bool) -> None:
    h, w, bias, labels = _case()
    h.requires_grad_()
    if trainable_head:
        w.requires_grad_()
        bias.requires_grad_()
    arguments = (h, w, labels, bias, 5.0, 0.5, -100, True, True)
    torch.library.opcheck(torch.ops.qtrain.linear_logprob.default, arguments)


def test_opcheck_of_the_heads_gradient() -> None:
    h, w, bias, labels = _case()
    lse, grad = torch.randn(11), torch.randn(11)
    arguments = (grad, lse - 1, lse, h, w, labels, bias, None, 1.0, -100, True, True, None)
    # it has no gradient of its own
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.qtrain.linear_logprob_head_grad.default, arguments, test_utils=tests)


@pytest.mark.parametrize("trainable_head", [False, True])
def test_compiles_to_one_graph_with_the_same_results(trainable_head: bool) -> None:
    h, w, bias, labels = _case()
    inputs = [h.requires_grad_()] + ([w.requires_grad_()] if trainable_head else [])

    def loss(h: torch.Tensor, w: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        output = linear_logprob(torch.tanh(h), w, labels, bias=bias, softcap=9.0, return_stats=True)
        return (output.logp * torch.arange(11)).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    eager, fused = loss(h, w, labels), compiled(h, w, labels)
    assert torch.equal(eager, fused)
    for a, b in zip(torch.autograd.grad(eager, inputs), torch.autograd.grad(fused, inputs), strict=True):
        assert torch.equal(a, b)
    labels[0] = -100  # other rows have a label: the same graph serves
    assert torch.equal(loss(h, w, labels), compiled(h, w, labels))


def test_a_second_derivative_is_refused() -> None:
    h, w, _, labels = _case()
    h.requires_grad_()
    (grad,) = torch.autograd.grad(linear_logprob(h, w, labels).exp().sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    h, w, bias, labels = _case(dtype)

    def run(autocast: bool) -> list[torch.Tensor]:
        inputs = [t.clone().requires_grad_() for t in (h, w, bias)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output = linear_logprob(inputs[0], inputs[1], labels, bias=inputs[2], return_stats=True)
            return [*output, *torch.autograd.grad(output.logp.sum(), inputs)]

    for plain, other in zip(run(False), run(True), strict=True):
        assert plain.dtype == other.dtype
        assert torch.equal(plain, other)


def test_strides_change_nothing() -> None:
    h, w, bias, labels = _case()

    def run(*inputs: torch.Tensor) -> list[torch.Tensor]:
        leaves = [t.detach().requires_grad_() for t in inputs[:3]]
        output = linear_logprob(leaves[0], leaves[1], inputs[3], bias=leaves[2], return_stats=True)
        return [*output, *torch.autograd.grad(output.logp.sum(), leaves)]

    strided = (h.T.contiguous().T, torch.cat([w, w], 1)[:, :16], bias.repeat_interleave(2)[::2])
    assert not any(t.is_contiguous() for t in strided)
    for plain, other in zip(
        run(h, w, bias, labels), run(*strided, labels.repeat_interleave(2)[::2]), strict=True
    ):
        # the order of additions in a matmul may depend on its layout
        torch.testing.assert_close(plain, other, rtol=1e-5, atol=1e-5)


def test_nothing_is_kept_for_a_head_that_is_frozen() -> None:
    h, w, _, labels = _case()
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear_logprob(h.requires_grad_(), w, labels)
    assert [tuple(t.shape) for t in kept] == [(11, 16)]  # u


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.zeros(4, 16), "float32"),
        (torch.zeros(4, 17, dtype=torch.bfloat16), "multiple of 16"),
    ],
)
def test_triton_is_refused_by_name(weight: torch.Tensor, reason: str) -> None:
    h = torch.zeros(2, weight.shape[1])
    with force_backend("triton"), pytest.raises(ValueError, match=reason):
        linear_logprob(h, weight, torch.tensor([0, 1]))
    assert choose_backend(weight)[0] == "pytorch"


@pytest.mark.parametrize(
    ("change", "words"),
    [({"hidden_states": torch.zeros(2, 4, dtype=torch.int64)}, "floating point")],
)
def test_wrong_types_are_named(change: dict[str, Any], words: str) -> None:
    arguments = {
        "hidden_states": torch.zeros(2, 4),
        "lm_head_weight": torch.zeros(40, 4),
        "labels": torch.tensor([0, 1]),
    } | change
    with pytest.raises(TypeError, match=words):
        linear_logprob(**arguments)
