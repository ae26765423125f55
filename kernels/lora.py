"""The LoRA linear layer, over a 16-bit or NF4 base weight.

    y = x W^T + bias + scaling * (drop(x) A^T) B^T

The base is frozen. For the backward x and xa = drop(x) A^T are saved and nothing else: W is decoded
again, the dropout mask is drawn again from its seed. Projections that share their input are one group:
x is read once for all their A's, and their input gradients are one sum. Source: Hu et al. 2021, LoRA;
`docs/kernels.md` has the derivation and the bytes.

Both backends (`lora_torch`, `lora_triton`) are the same five products; this file composes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import nf4
from .choice import triton_serves
from .nf4 import NF4Weight

Weight = Tensor | NF4Weight


def lora_linear(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """y = x W^T + bias + scaling * (drop(x) A^T) B^T, [..., N] in the dtype of x.

    drop(x) = x * mask / (1 - dropout_p), the mask a function of `seed` and the shape of x; without a
    seed one is drawn from torch's default CPU generator. All matmuls run in the dtype of x, or under
    autocast in autocast's, as in `torch.nn.functional.linear`; A and B are cast to it.
    Differentiable in x, A, B and the bias; gradients of A and B come from float32 accumulators.

    Args:
        x: [..., K], floating point.
        weight: [N, K], frozen, of x's dtype (any under autocast), or an `NF4Weight`.
        lora_A: [r, K], any floating dtype.
        lora_B: [N, r], any floating dtype.
        scaling: alpha / r.
        bias: [N] or None, any floating dtype.
        dropout_p: in [0, 1).
        seed: in [0, 2^63).

    Raises:
        ValueError: shapes that do not fit, a weight that requires a gradient or has another dtype than
            x, dropout_p or seed out of range.
    """
    (y,) = lora_linear_group(
        x, [weight], [lora_A], [lora_B], [scaling], biases=[bias], dropout_p=dropout_p, seed=seed
    )
    return y


def lora_linear_group(
    x: Tensor,
    weights: Sequence[Weight],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    *,
    biases: Sequence[Tensor | None] | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
) -> tuple[Tensor, ...]:
    """`lora_linear` for layers that share their input: y_i = x W_i^T + bias_i + s_i (drop(x) A_i^T) B_i^T.

    The layers share one dropout mask of x, as one layer of rank r_1 + r_2 + ... would. Ranks may differ.

    Args:
        x: [..., K].
        weights: [N_i, K] each.
        lora_As: [r_i, K] each.
        lora_Bs: [N_i, r_i] each.
        scalings: one each.
        biases: [N_i] or None each.
        dropout_p: in [0, 1).
        seed: in [0, 2^63).

    Raises:
        ValueError: as `lora_linear`, or lists of different lengths.
    """
    biases = [None] * len(weights) if biases is None else biases
    dtype = _compute_dtype(x)
    _check_lengths(weights, lora_As, lora_Bs, scalings, biases)
    _check_range(dropout_p, seed)
    base: list[Tensor] = []
    layout: list[int] = []
    for index, weight in enumerate(weights):
        where = f"[{index}]" if len(weights) > 1 else ""
        weight = _cast(weight, x, dtype)
        _check_member(x, weight, lora_As[index], lora_Bs[index], biases[index], where)
        tensors, sizes = _flatten(weight, _frozen(biases[index]))
        base += tensors
        layout += sizes
    drawn = None
    if dropout_p > 0:
        drawn = torch.tensor(seed) if seed is not None else torch.randint(1 << 62, (), device="cpu")
    flat = x.to(dtype).reshape(-1, x.shape[-1])  # [M, K]
    *ys, _ = _group(
        flat,
        base,
        layout,
        list(lora_As),
        list(lora_Bs),
        [float(scaling) for scaling in scalings],
        float(dropout_p),
        drawn,
        triton_serves(x.device, dtype),
    )
    return tuple(
        _add_trained(y.view(*x.shape[:-1], y.shape[1]), bias) for y, bias in zip(ys, biases, strict=True)
    )


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def _cast(weight: Weight, x: Tensor, dtype: torch.dtype) -> Weight:
    """Autocast casts a 16- or 32-bit weight with x; an NF4 one is decoded to whatever is needed."""
    if isinstance(weight, NF4Weight) or dtype == x.dtype or weight.dtype == torch.float64:
        return weight
    return weight.to(dtype)


def _frozen(bias: Tensor | None) -> Tensor | None:
    """A bias that is trained is added outside of the op, where autograd sees it."""
    return None if bias is None or bias.requires_grad else bias


def _add_trained(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None or not bias.requires_grad else y + bias.to(y.dtype)


def _check_lengths(weights: Sequence[Any], *others: Sequence[Any]) -> None:
    if not weights:
        raise ValueError("weights is empty, a group has one layer at least")
    for name, items in zip(("lora_As", "lora_Bs", "scalings", "biases"), others, strict=True):
        if len(items) != len(weights):
            raise ValueError(f"{name} has {len(items)} entries for {len(weights)} weights")


def _check_range(dropout_p: float, seed: int | None) -> None:
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p is {dropout_p}, must be in [0, 1)")
    if seed is not None and not 0 <= seed < 1 << 63:
        raise ValueError(f"seed is {seed}, must be in [0, 2^63)")


def _check_member(
    x: Tensor, weight: Weight, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, where: str
) -> None:
    shape = tuple(weight.shape)
    if x.dim() < 1 or len(shape) != 2 or shape[1] != x.shape[-1]:
        raise ValueError(f"x {tuple(x.shape)} and weight{where} {shape} must be [..., K] and [N, K]")
    if lora_A.dim() != 2 or lora_A.shape[1] != shape[1]:
        raise ValueError(f"lora_A{where} {tuple(lora_A.shape)} must be [r, {shape[1]}]")
    if lora_B.shape != (shape[0], lora_A.shape[0]):
        raise ValueError(f"lora_B{where} {tuple(lora_B.shape)} must be {(shape[0], lora_A.shape[0])}")
    if bias is not None and bias.shape != (shape[0],):
        raise ValueError(f"bias{where} {tuple(bias.shape)} must be [{shape[0]}]")
    if isinstance(weight, NF4Weight):
        if not x.is_floating_point():
            raise ValueError(f"x is {x.dtype}, must be floating point")
        return
    if weight.requires_grad:
        raise ValueError(f"weight{where} requires a gradient: only lora_A, lora_B and the bias are trained")
    if weight.dtype != (dtype := _compute_dtype(x)):
        raise ValueError(f"weight{where} is {weight.dtype}, must be {dtype} as x, or an NF4Weight")


# The dispatcher passes tensors and integers: a layer is 6 integers, and 1 to 7 tensors of `base`.
_SIZES = 6


def _flatten(weight: Weight, bias: Tensor | None) -> tuple[list[Tensor], list[int]]:
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


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    x, xa, seed, *rest = ctx.saved_tensors
    size, count = ctx.counts
    base, lora_As, lora_Bs = rest[:size], rest[size : size + count], rest[size + count :]
    layout, scalings, dropout_p, triton = ctx.settings
    want_dx, _, _, want_A, want_B, *_ = ctx.needs_input_grad
    dys = _defined(grads[:-1], lora_Bs)
    if not dys:
        return None, [None] * size, None, [None] * count, [None] * count, None, None, None, None
    if not (any(want_A) or any(want_B)):
        x = xa = None
    found = _group_backward(
        dys, x, xa, base, layout, lora_As, lora_Bs, scalings, dropout_p, seed, triton, want_dx
    )
    dx = found.pop(0) if want_dx else None
    dAs: list[Tensor | None] = [None] * count
    dBs: list[Tensor | None] = [None] * count
    if x is not None:
        parts = torch.split(found[-1], [a.shape[0] for a in lora_As])
        dAs = [_as(part, a, want) for part, a, want in zip(parts, lora_As, want_A, strict=True)]
        dBs = [_as(dB, b, want) for dB, b, want in zip(found[:-1], lora_Bs, want_B, strict=True)]
    return dx, [None] * size, None, dAs, dBs, None, None, None, None


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


_group.register_autograd(_differentiate, setup_context=_save)
