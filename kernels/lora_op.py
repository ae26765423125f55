"""The op `qtrain::lora_linear_group` and its gradients, for autograd, torch.compile and fake tensors.

Both backends compute the same five products (`down`, `forward`, `up_grad`, `weight_grads`, `input_grad`);
this file composes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import nf4
from .nf4 import NF4Weight

Weight = Tensor | NF4Weight

# The dispatcher passes tensors and integers: a layer is 6 integers, and 1 to 7 tensors of `base`.
_SIZES = 6


def flatten(weight: Weight, bias: Tensor | None) -> tuple[list[Tensor], list[int]]:
    """One layer's frozen tensors and their layout."""
    if isinstance(weight, NF4Weight):
        tensors, sizes = nf4.flatten(weight)
    else:
        tensors, sizes = [weight], [*weight.shape, 0, 0]
    if bias is not None:
        tensors = [*tensors, bias]
    return tensors, [*sizes, len(tensors), int(bias is not None)]


def _unflatten(
    base: Sequence[Tensor], layout: Sequence[int], dtype: torch.dtype
) -> list[tuple[Weight, Tensor | None]]:
    layers: list[tuple[Weight, Tensor | None]] = []
    first = 0
    for at in range(0, len(layout), _SIZES):
        *sizes, count, has_bias = layout[at : at + _SIZES]
        tensors = base[first : first + count]
        first += count
        quantised = sizes[2] > 0
        weight: Weight = nf4.unflatten(tensors, sizes, dtype) if quantised else tensors[0]
        layers.append((weight, tensors[-1] if has_bias else None))
    return layers


def _products(triton: bool) -> ModuleType:
    if triton:
        from . import lora_triton

        return lora_triton
    from . import lora_torch

    return lora_torch


@torch.library.custom_op("qtrain::lora_linear_group", mutates_args=())
def _group(
    x: Tensor,
    base: list[Tensor],
    layout: list[int],
    lora_As: list[Tensor],
    lora_Bs: list[Tensor],
    scalings: list[float],
    dropout_p: float,
    seed: Tensor | None,
    triton: bool,
) -> list[Tensor]:
    """[y_1, y_2, ..., xa]."""
    products, x = _products(triton), x.contiguous()
    xa = products.down(x, lora_As, dropout_p, _number(seed))
    columns = torch.split(xa, [a.shape[0] for a in lora_As], dim=1)
    layers = _unflatten(base, layout, x.dtype)
    ys = [
        products.forward(x, weight, bias, part, lora_B, scaling)
        for (weight, bias), part, lora_B, scaling in zip(layers, columns, lora_Bs, scalings, strict=True)
    ]
    return [*ys, xa]


@_group.register_fake
def _(
    x: Tensor, _base: Any, _layout: Any, lora_As: list[Tensor], lora_Bs: list[Tensor], *_: Any
) -> list[Tensor]:
    ys = [x.new_empty(x.shape[0], lora_B.shape[0]) for lora_B in lora_Bs]
    return [*ys, x.new_empty(x.shape[0], sum(a.shape[0] for a in lora_As))]


@torch.library.custom_op("qtrain::lora_linear_group_backward", mutates_args=())
def _group_backward(
    dys: list[Tensor],
    x: Tensor | None,
    xa: Tensor | None,
    base: list[Tensor],
    layout: list[int],
    lora_As: list[Tensor],
    lora_Bs: list[Tensor],
    scalings: list[float],
    dropout_p: float,
    seed: Tensor | None,
    triton: bool,
    want_dx: bool,
) -> list[Tensor]:
    """[dx] if wanted, then [dB_1, dB_2, ..., dA] if x and xa are given; dA is that of all A's, [R, K]."""
    products, number = _products(triton), _number(seed)
    dys = [dy.contiguous() for dy in dys]
    ranks = [a.shape[0] for a in lora_As]
    g = dys[0].new_empty(dys[0].shape[0], sum(ranks))  # [M, R]
    for dy, lora_B, scaling, columns in zip(
        dys, lora_Bs, scalings, torch.split(g, ranks, dim=1), strict=True
    ):
        products.up_grad(dy, lora_B, scaling, columns)
    weights = [weight for weight, _ in _unflatten(base, layout, g.dtype)]
    if x is None or xa is None:
        return [products.input_grad(dys, weights, g, lora_As, dropout_p, number)] if want_dx else []
    x, parts = x.contiguous(), torch.split(xa, ranks, dim=1)
    if want_dx and not triton:
        dx, dBs, dA = products.both_grads(dys, weights, parts, scalings, g, x, lora_As, dropout_p, number)
        return [dx, *dBs, dA]
    dxs = [products.input_grad(dys, weights, g, lora_As, dropout_p, number)] if want_dx else []
    dBs, dA = products.weight_grads(dys, parts, scalings, g, x, dropout_p, number)
    return [*dxs, *dBs, dA]


@_group_backward.register_fake
def _(
    dys: list[Tensor],
    x: Tensor | None,
    xa: Tensor | None,
    _base: Any,
    _layout: Any,
    lora_As: list[Tensor],
    lora_Bs: list[Tensor],
    *settings: Any,
) -> list[Tensor]:
    k = lora_As[0].shape[1]
    dtype = torch.promote_types(dys[0].dtype, torch.float32)
    grads = [dys[0].new_empty(dys[0].shape[0], k)] if settings[-1] else []
    if x is not None and xa is not None:
        grads += [lora_B.new_empty(lora_B.shape, dtype=dtype) for lora_B in lora_Bs]
        grads.append(dys[0].new_empty(xa.shape[1], k, dtype=dtype))
    return grads


def _number(seed: Tensor | None) -> int:
    return 0 if seed is None else int(seed.item())


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, base, layout, lora_As, lora_Bs, scalings, dropout_p, seed, triton = inputs
    trained = any(factor.requires_grad for factor in (*lora_As, *lora_Bs))
    ctx.save_for_backward(
        x if trained else None, output[-1] if trained else None, seed, *base, *lora_As, *lora_Bs
    )
    ctx.counts = (len(base), len(lora_As))
    ctx.settings = (layout, scalings, dropout_p, triton)
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, grads: Sequence[Tensor | None], want_dx: bool, want_A: Sequence[bool], want_B: Sequence[bool]
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """Of x, of the A's, of the B's."""
    x, xa, seed, *rest = ctx.saved_tensors
    size, count = ctx.counts
    base, lora_As, lora_Bs = rest[:size], rest[size : size + count], rest[size + count :]
    layout, scalings, dropout_p, triton = ctx.settings
    nothing: list[Tensor | None] = [None] * count
    dys = _defined(grads, lora_Bs)
    if not dys:
        return None, nothing, nothing
    if not (any(want_A) or any(want_B)):
        x = xa = None
    found = _group_backward(
        dys, x, xa, base, layout, lora_As, lora_Bs, scalings, dropout_p, seed, triton, want_dx
    )
    dx = found.pop(0) if want_dx else None
    if x is None:
        return dx, nothing, nothing
    parts = torch.split(found[-1], [a.shape[0] for a in lora_As])
    dAs = [_as(part, a, want) for part, a, want in zip(parts, lora_As, want_A, strict=True)]
    dBs = [_as(dB, b, want) for dB, b, want in zip(found[:-1], lora_Bs, want_B, strict=True)]
    return dx, dAs, dBs


def _defined(grads: Sequence[Tensor | None], lora_Bs: Sequence[Tensor]) -> list[Tensor]:
    """Zeros for a layer whose output went unused: seldom enough to be no case of its own."""
    known = next((dy for dy in grads if dy is not None), None)
    if known is None:
        return []
    return [
        known.new_zeros(known.shape[0], lora_B.shape[0]) if dy is None else dy
        for dy, lora_B in zip(grads, lora_Bs, strict=True)
    ]


def _as(grad: Tensor, parameter: Tensor, want: bool) -> Tensor | None:
    return grad.to(parameter.dtype) if want else None


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    want_dx, _, _, want_A, want_B, *others = ctx.needs_input_grad
    dx, dAs, dBs = _gradients(ctx, grads[:-1], want_dx, want_A, want_B)
    return dx, [None] * ctx.counts[0], None, dAs, dBs, *[None for _ in others]


_group.register_autograd(_differentiate, setup_context=_save)


class _Eager(torch.autograd.Function):
    """The same op and gradients without the dispatcher's handling of lists, which costs 0.3 ms a call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Any, layout: Any, settings: Any, *factors: Tensor) -> Any:
        count = len(factors) // 2
        inputs = (x, base, layout, list(factors[:count]), list(factors[count:]), *settings)
        outputs = _group(*inputs)
        _save(ctx, inputs, outputs)
        ctx.mark_non_differentiable(outputs[-1])
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        want_dx, _, _, _, *want = ctx.needs_input_grad
        count = ctx.counts[1]
        dx, dAs, dBs = _gradients(ctx, grads[:-1], want_dx, want[:count], want[count:])
        return dx, None, None, None, *dAs, *dBs


def run(
    x: Tensor,
    base: list[Tensor],
    layout: list[int],
    lora_As: list[Tensor],
    lora_Bs: list[Tensor],
    *settings: Any,
) -> Sequence[Tensor]:
    """[y_1, y_2, ...] of x [M, K]; `settings` are scalings, dropout_p, seed and whether Triton serves."""
    if torch.compiler.is_compiling():
        outputs = _group(x, base, layout, lora_As, lora_Bs, *settings)
    else:
        outputs = _Eager.apply(x, base, layout, settings, *lora_As, *lora_Bs)  # type: ignore[no-untyped-call]
    return outputs[:-1]
