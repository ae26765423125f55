"""Cases for linear_logprob: inputs, the float64 truth, and the plain op of the same dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qtrain.kernels import LogprobOutput, linear_logprob, reference

Op = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor]]
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """Arguments of `linear_logprob`, and the gradient of its logp."""

    h: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float
    grad: Tensor
    trainable_head: bool


def make_case(
    rows: int,
    hidden: int,
    vocab: int,
    dtype: torch.dtype,
    *,
    hidden_dtype: torch.dtype | None = None,
    bias: bool = False,
    forbidden: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
    spread: float = 3.0,
    ignored: float = 0.3,
    trainable_head: bool = False,
    seed: int = 0,
) -> Case:
    """spread: about the logits' standard deviation. forbidden: the share of words with a bias of -inf."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(rows, hidden, generator=generator).to(dtype)
    weight = (torch.randn(vocab, hidden, generator=generator) * spread / hidden**0.5).to(dtype)
    # few different labels, so that rows share them; the ends of the vocabulary and of a tile among them
    ends = torch.tensor([0, vocab - 1, 255, 256]) % vocab
    labels = torch.cat([torch.randint(0, vocab, (5,), generator=generator), ends]).repeat(rows)[:rows]
    b = None
    if bias:
        b = torch.randn(vocab, generator=generator).to(dtype)
        b[torch.rand(vocab, generator=generator) < forbidden] = -torch.inf
        b[labels] = 0
    labels[torch.rand(rows, generator=generator) < ignored] = -100
    grad = torch.randn(rows, generator=generator)
    h = h.to(hidden_dtype or dtype)
    return Case(h, weight, labels, b, softcap, scale, grad, trainable_head)


def run(case: Case, op: Op, dtype: torch.dtype | None = None) -> Results:
    """Results and gradients by name, in float64."""
    h = case.h.to(dtype or case.h.dtype).detach().clone().requires_grad_()
    weight = case.weight.to(dtype or case.weight.dtype).detach().clone().requires_grad_(case.trainable_head)
    bias = case.bias
    if bias is not None:
        bias = bias.to(dtype or bias.dtype).detach().clone().requires_grad_(case.trainable_head)
    logp, lse, entropy = op(h, weight, bias)
    results = {"logp": logp, "lse": lse, "entropy": entropy}
    inputs = {"dh": h}
    if case.trainable_head:
        inputs["dW"] = weight
        if bias is not None:
            inputs["db"] = bias
    grads = torch.autograd.grad(logp, list(inputs.values()), case.grad.to(logp.dtype))
    results |= dict(zip(inputs, grads, strict=True))
    return {name: value.detach().double() for name, value in results.items()}


def ours(case: Case) -> Results:
    """What the public op gives."""

    def op(h: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        output = linear_logprob(
            h,
            weight,
            case.labels,
            bias=bias,
            softcap=case.softcap,
            logit_scale=case.scale,
            return_stats=True,
        )
        assert isinstance(output, LogprobOutput)
        return output

    return run(case, op)


def truth(case: Case) -> Results:
    """In float64, from the inputs as they are."""

    def op(h: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        low = h.to(case.weight.dtype).double() if case.h.dtype != case.weight.dtype else h
        h = h + (low - h).detach()  # hidden states are cast to the weight's dtype
        return reference.linear_logprob(
            h, weight, case.labels, bias=bias, softcap=case.softcap, logit_scale=case.scale
        )

    return run(case, op, torch.float64)


def plain(case: Case) -> Results:
    """The usual code: logits in the weight's dtype, then float32."""

    def op(h: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        logits = torch.nn.functional.linear(h.to(weight.dtype), weight).float()
        if bias is not None:
            logits = logits + bias
        logits = logits * case.scale
        if case.softcap is not None:
            logits = case.softcap * torch.tanh(logits / case.softcap)
        labelled = case.labels != -100
        log_softmax = logits.log_softmax(-1)
        logp = log_softmax.gather(1, case.labels.clamp_min(0)[:, None])[:, 0]
        entropy = torch.special.entr(log_softmax.exp()).sum(-1)
        values = (logp, logits.logsumexp(-1), entropy)
        logp, lse, entropy = (torch.where(labelled, value, 0.0) for value in values)
        return logp, lse, entropy

    return run(case, op)


def assert_no_less_exact(case: Case, found: Results, roundings: float) -> None:
    """Errors against float64.

    logp, lse and entropy never leave float32: 16 times its resolution at the largest logit (or the cap, which
    is what its rounding goes by), for sums of different order and approximate exponentials. Gradients, three
    ways: at most the plain op's error and `roundings` of the largest one to the low dtype, as u is rounded
    and then its product with the gradient, and P before.
    """
    exact, usual = truth(case), plain(case)
    largest = max(1.0, case.softcap or 0.0, *(float(exact[name].abs().max()) for name in ("lse", "logp")))
    for name, value in found.items():
        error = (value - exact[name]).abs().max()
        if name in ("dh", "dW", "db"):
            bound = float((usual[name] - exact[name]).abs().max())
            bound += roundings * torch.finfo(case.weight.dtype).eps / 2 * float(exact[name].abs().max())
        else:
            bound = 16 * torch.finfo(torch.float32).eps * largest
        assert error <= bound, f"{name}: error {error:.3g}, bound {bound:.3g}"  # false for a NaN
