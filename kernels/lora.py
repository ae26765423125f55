"""The LoRA linear layer, over a 16-bit or NF4 base weight.

    y = x W^T + bias + scaling * (drop(x) A^T) B^T

The base is frozen. For the backward x and xa = drop(x) A^T are saved and nothing else: W is decoded
again, the dropout mask is drawn again from its seed. Projections that share their input are one group:
x is read once for all their A's, and their input gradients are one sum. Source: Hu et al. 2021, LoRA;
`docs/kernels.md` has the derivation and the bytes.

Here are the public functions and their checks; `lora_op` is the op that autograd and torch.compile see,
`lora_torch` and `lora_triton` its arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .choice import HAS_TRITON, Backend, forced_backend, triton_serves
from .lora_op import Weight, flatten, run
from .nf4 import NF4Weight


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
        tensors, sizes = flatten(weight, _frozen(biases[index]))
        base += tensors
        layout += sizes
    drawn = None
    if dropout_p > 0:
        drawn = torch.tensor(seed) if seed is not None else torch.randint(1 << 62, (), device="cpu")
    flat = x.to(dtype).reshape(-1, x.shape[-1])  # [M, K]
    serves, _reason = backend(x.device, dtype, weights)
    ys = run(
        flat,
        base,
        layout,
        list(lora_As),
        list(lora_Bs),
        [float(scaling) for scaling in scalings],
        float(dropout_p),
        drawn,
        serves == "triton",
    )
    return tuple(
        _add_trained(y.view(*x.shape[:-1], y.shape[1]), bias) for y, bias in zip(ys, biases, strict=True)
    )


def backend(device: torch.device, dtype: torch.dtype, weights: Sequence[Weight]) -> tuple[Backend, str]:
    """Which path serves a group of layers that compute in `dtype` on `device`, and why.

    Raises:
        ValueError: `force_backend` asks for Triton and these layers can't be served.
    """
    if not triton_serves(device, dtype):
        return "pytorch", f"{device.type} tensors" if HAS_TRITON else "triton is not installed"
    from .lora_triton import obstacle

    reason = obstacle(dtype, weights)
    if reason is None:
        return "triton", "LoRA and NF4 decode in the accumulator of the base product"
    if forced_backend() == "triton":
        raise ValueError(f"lora_linear can't take its Triton kernels: {reason}")
    return "pytorch", reason


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
