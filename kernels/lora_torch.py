"""The five products of `lora_linear` in PyTorch: no pass over an [M, N] or [M, K] tensor besides the matmuls.

Tensors are two-dimensional, their last dimension contiguous; nothing here knows autograd. Scalings are
folded into the small factors A [R, K] and B [N, r], and sums into the matmul that makes their last term.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .cpu_matmul import product_with
from .nf4 import NF4Weight, dequantize

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
MASK_ELEMENTS = 1 << 20  # of a tile of rows: mask and masked rows stay in cache, products stay large


def down(x: Tensor, lora_As: Sequence[Tensor], dropout_p: float, seed: int) -> Tensor:
    """drop(x) [A_1; A_2; ...]^T, [M, R]."""
    stacked = _stacked(lora_As, x.dtype, dropout_p)
    if dropout_p == 0:
        return x @ stacked.T
    xa = x.new_empty(x.shape[0], stacked.shape[0])
    for rows, keep in keep_tiles(x, dropout_p, seed):
        torch.mm(_masked(x[rows], keep), stacked.T, out=xa[rows])
    return xa


def forward(
    x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None, xa: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    """x W^T + bias + scaling * xa B^T, [M, N]."""
    y = product_with(x, _dense(weight, x.dtype), None if bias is None else bias.to(x.dtype))
    return y.addmm_(xa, _scaled(lora_B, scaling, x.dtype).T)


def up_grad(dy: Tensor, lora_B: Tensor, scaling: float, out: Tensor) -> None:
    """out = scaling * dy B, [M, r]; `out` may be columns of a wider tensor."""
    torch.mm(dy, _scaled(lora_B, scaling, dy.dtype), out=out)


def weight_grads(
    dys: Sequence[Tensor],
    xas: Sequence[Tensor],
    scalings: Sequence[float],
    g: Tensor,
    x: Tensor,
    dropout_p: float,
    seed: int,
) -> tuple[list[Tensor], Tensor]:
    """([scaling_i dy_i^T xa_i, [N_i, r_i]], g^T drop(x), [R, K]) in float32 (float64 for float64)."""
    dBs = [_grad_B(dy, xa, scaling) for dy, xa, scaling in zip(dys, xas, scalings, strict=True)]
    if dropout_p == 0:
        return dBs, (g.T @ x).to(_wide(x))
    dA = torch.zeros(g.shape[1], x.shape[1], dtype=_wide(x), device=x.device)
    for rows, keep in keep_tiles(x, dropout_p, seed):
        dA += g[rows].T @ _masked(x[rows], keep)
    return dBs, dA.div_(1 - dropout_p)


def input_grad(
    dys: Sequence[Tensor],
    weights: Sequence[Tensor | NF4Weight],
    g: Tensor,
    lora_As: Sequence[Tensor],
    dropout_p: float,
    seed: int,
) -> Tensor:
    """sum_i dy_i W_i + mask / (1 - p) * (g [A_1; A_2; ...]), [M, K]."""
    dx = _base_grad(dys, weights)
    stacked = _stacked(lora_As, g.dtype, dropout_p)
    if dropout_p == 0:
        return dx.addmm_(g, stacked)
    for rows, keep in keep_tiles(dx, dropout_p, seed):
        _add_masked(dx[rows], g[rows] @ stacked, keep)
    return dx


def both_grads(
    dys: Sequence[Tensor],
    weights: Sequence[Tensor | NF4Weight],
    xas: Sequence[Tensor],
    scalings: Sequence[float],
    g: Tensor,
    x: Tensor,
    lora_As: Sequence[Tensor],
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """(`input_grad`, *`weight_grads`) of one mask: drawing it costs as much as a low-rank product."""
    if dropout_p == 0:
        dx = input_grad(dys, weights, g, lora_As, dropout_p, seed)
        return dx, *weight_grads(dys, xas, scalings, g, x, dropout_p, seed)
    dx = _base_grad(dys, weights)
    dBs = [_grad_B(dy, xa, scaling) for dy, xa, scaling in zip(dys, xas, scalings, strict=True)]
    dA = torch.zeros(g.shape[1], x.shape[1], dtype=_wide(x), device=x.device)
    stacked = _stacked(lora_As, g.dtype, dropout_p)
    for rows, keep in keep_tiles(x, dropout_p, seed):
        _add_masked(dx[rows], g[rows] @ stacked, keep)
        dA += g[rows].T @ _masked(x[rows], keep)
    return dx, dBs, dA.div_(1 - dropout_p)


def keep_tiles(like: Tensor, dropout_p: float, seed: int) -> Iterator[tuple[slice, Tensor]]:
    """The mask of `like` [M, K] as tiles of rows: integers as wide as its dtype, all ones or zero.

    A function of the seed and the shape. An element is kept where 16 random bits are below
    (1 - p) * 2^16, so p is met within 2^-17: a fifth of the time of `bernoulli_`.
    """
    rows, columns = like.shape
    generator = torch.Generator(like.device).manual_seed(seed)
    bound = min(round((1 - dropout_p) * 65536) - 32768, 32767)
    height = max(1, MASK_ELEMENTS // columns)
    for first in range(0, rows, height):
        tile = slice(first, min(first + height, rows))
        count = (tile.stop - first) * columns
        bits = torch.empty(-(-count // 4), dtype=torch.int64, device=like.device)
        bits.random_(-(1 << 63), None, generator=generator)  # all 64 bits of each
        keep = bits.view(torch.int16)[:count].view(-1, columns)
        keep.clamp_(bound - 1, bound).sub_(bound)  # -1 below the bound, 0 from there on
        yield tile, keep.to(_INTEGERS[like.dtype.itemsize])


def _masked(x: Tensor, keep: Tensor) -> Tensor:
    """x where kept, else 0, in the memory of `keep`: a bitwise and, which vectorises in every dtype."""
    return keep.bitwise_and_(x.view(keep.dtype)).view(x.dtype)


def _add_masked(total: Tensor, x: Tensor, keep: Tensor) -> None:
    """total += x where kept; x is overwritten."""
    x.view(keep.dtype).bitwise_and_(keep)
    total += x


def _base_grad(dys: Sequence[Tensor], weights: Sequence[Tensor | NF4Weight]) -> Tensor:
    dx = product_with(dys[0], _dense(weights[0], dys[0].dtype).T)
    for dy, weight in zip(dys[1:], weights[1:], strict=True):
        dx.addmm_(dy, _dense(weight, dy.dtype))
    return dx


def _grad_B(dy: Tensor, xa: Tensor, scaling: float) -> Tensor:
    return (dy.T @ xa).to(_wide(dy)).mul_(scaling)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _dense(weight: Tensor | NF4Weight, dtype: torch.dtype) -> Tensor:
    return dequantize(weight, dtype, triton=False) if isinstance(weight, NF4Weight) else weight


def _stacked(lora_As: Sequence[Tensor], dtype: torch.dtype, dropout_p: float) -> Tensor:
    """[A_1; A_2; ...] / (1 - p), [R, K]."""
    stacked = lora_As[0] if len(lora_As) == 1 else torch.cat(list(lora_As))
    return stacked.to(dtype) if dropout_p == 0 else _scaled(stacked, 1 / (1 - dropout_p), dtype)


def _scaled(factor: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """factor * scaling in the wider of the two dtypes, then rounded to `dtype`."""
    return (factor.to(torch.promote_types(factor.dtype, dtype)) * scaling).to(dtype)
