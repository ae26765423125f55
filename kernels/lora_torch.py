"""The five products of `lora_linear` in PyTorch: no pass over an [M, N] or [M, K] tensor besides the matmuls.

Tensors are two-dimensional, their last dimension contiguous; nothing here knows autograd. Scalings are
folded into the small factors A [R, K] and B [N, r], and sums into the matmul that makes their last term.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .nf4 import NF4Weight, dequantize

MASK_ELEMENTS = 1 << 18  # of a tile of rows: mask and masked rows stay in a core's second-level cache


def down(x: Tensor, lora_As: Sequence[Tensor], dropout_p: float, seed: int) -> Tensor:
    """drop(x) [A_1; A_2; ...]^T, [M, R]."""
    stacked = _stacked(lora_As, x.dtype, dropout_p)
    if dropout_p == 0:
        return x @ stacked.T
    xa = x.new_empty(x.shape[0], stacked.shape[0])
    for rows, keep in keep_tiles(x, dropout_p, seed):
        torch.mm(keep.mul_(x[rows]), stacked.T, out=xa[rows])
    return xa


def forward(
    x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None, xa: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    """x W^T + bias + scaling * xa B^T, [M, N]."""
    y = torch.nn.functional.linear(x, _dense(weight, x.dtype), None if bias is None else bias.to(x.dtype))
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
    dtype = torch.promote_types(x.dtype, torch.float32)
    dBs = [(dy.T @ xa).to(dtype).mul_(scaling) for dy, xa, scaling in zip(dys, xas, scalings, strict=True)]
    if dropout_p == 0:
        return dBs, (g.T @ x).to(dtype)
    dA = torch.zeros(g.shape[1], x.shape[1], dtype=dtype, device=x.device)
    for rows, keep in keep_tiles(x, dropout_p, seed):
        dA += g[rows].T @ keep.mul_(x[rows])
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
    dx = dys[0] @ _dense(weights[0], g.dtype)
    for dy, weight in zip(dys[1:], weights[1:], strict=True):
        dx.addmm_(dy, _dense(weight, g.dtype))
    stacked = _stacked(lora_As, g.dtype, dropout_p)
    if dropout_p == 0:
        return dx.addmm_(g, stacked)
    for rows, keep in keep_tiles(dx, dropout_p, seed):
        dx[rows].addcmul_(g[rows] @ stacked, keep)
    return dx


def keep_tiles(like: Tensor, dropout_p: float, seed: int) -> Iterator[tuple[slice, Tensor]]:
    """The mask of `like` [M, K] as tiles of rows of ones and zeros in its dtype.

    A function of the seed and the shape. An element is dropped where 16 random bits are below
    p * 2^16, so p is met within 2^-17: a fifth of the time of `bernoulli_`.
    """
    rows, columns = like.shape
    generator = torch.Generator(like.device).manual_seed(seed)
    threshold = round(dropout_p * 65536) - 32768
    height = max(1, MASK_ELEMENTS // columns)
    for first in range(0, rows, height):
        tile = slice(first, min(first + height, rows))
        count = (tile.stop - first) * columns
        bits = torch.empty(-(-count // 4), dtype=torch.int64, device=like.device)
        bits.random_(-(1 << 63), None, generator=generator)  # all 64 bits of each
        keep = bits.view(torch.int16)[:count].view(-1, columns) >= threshold
        yield tile, keep.to(like.dtype)


def _dense(weight: Tensor | NF4Weight, dtype: torch.dtype) -> Tensor:
    return dequantize(weight, dtype, triton=False) if isinstance(weight, NF4Weight) else weight


def _stacked(lora_As: Sequence[Tensor], dtype: torch.dtype, dropout_p: float) -> Tensor:
    """[A_1; A_2; ...] / (1 - p), [R, K]."""
    stacked = lora_As[0] if len(lora_As) == 1 else torch.cat(list(lora_As))
    return (stacked if dropout_p == 0 else stacked / (1 - dropout_p)).to(dtype)


def _scaled(lora_B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    return (lora_B * scaling).to(dtype)
