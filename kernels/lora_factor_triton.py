"""The thin products of LoRA, bound by memory: projections onto the rank, and the gradients of A and B.

    out[m, r] = alpha sum_k keep x[m, k] V[k, r]           `_project_kernel`
    out[r, c] = alpha sum_m small[m, r] keep big[m, c]     `_weight_grad_kernel`

A program owns its output tile and walks the whole reduction: no partial sums, no atomics, the same bits on
every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dropout_triton import keep_mask


@triton.jit(do_not_specialize=["rows", "seed_low", "seed_high", "drop_threshold"])
def _project_kernel(
    x_ptr, factor_ptr, out_ptr, rows, K, x_stride, out_stride, alpha, seed_low, seed_high, drop_threshold,
    RANK: tl.constexpr, ROW_MAJOR: tl.constexpr, DROPOUT: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """out = alpha keep * x V for one [BM, BR] tile; V[k, r] is A[r, k] (ROW_MAJOR) or B[k, r]."""
    BK: tl.constexpr = 64
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    DOT: tl.constexpr = tl.float32 if INTERPRET else DTYPE
    pid_m = tl.program_id(0)
    rank = tl.program_id(1) * BR + tl.arange(0, BR)
    row = tl.minimum(tl.arange(0, BM), rows - 1 - pid_m * BM)
    step = tl.arange(0, BK)
    x_base = x_ptr + (pid_m * BM).to(tl.int64) * x_stride
    x_place = row[:, None] * x_stride + step[None, :]
    if ROW_MAJOR:
        factor_place = rank[:, None] * K + step[None, :]
    else:
        factor_place = step[:, None] * RANK + rank[None, :]
    acc = tl.zeros((BM, BR), tl.float32)
    for k in range(0, K // BK):
        x = tl.load(x_base + x_place)
        if DROPOUT:
            keep = keep_mask(seed_low, seed_high, pid_m * BM + row, k * BK, drop_threshold, BM, BK)
            x = tl.where(keep, x, 0.0)
        if ROW_MAJOR:
            factor = tl.trans(tl.load(factor_ptr + factor_place, mask=(rank < RANK)[:, None], other=0.0))
            factor_ptr += BK
        else:
            factor = tl.load(factor_ptr + factor_place, mask=(rank < RANK)[None, :], other=0.0)
            factor_ptr += BK * RANK
        acc = tl.dot(x.to(DOT), factor.to(DTYPE).to(DOT), acc)
        x_base += BK
    out_row = pid_m * BM + tl.arange(0, BM)
    place = out_row[:, None].to(tl.int64) * out_stride + rank[None, :]
    tl.store(
        out_ptr + place, (acc * alpha).to(DTYPE), mask=(out_row[:, None] < rows) & (rank[None, :] < RANK)
    )


@triton.jit(do_not_specialize=["rows", "seed_low", "seed_high", "drop_threshold"])
def _weight_grad_kernel(
    small_ptr, big_ptr, out_ptr, rows, C, small_stride, big_stride, alpha,
    seed_low, seed_high, drop_threshold,
    RANK: tl.constexpr, ROW_MAJOR: tl.constexpr, DROPOUT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """out = alpha small^T (keep * big) for one [BR, BC] tile, stored as [RANK, C] or as [C, RANK]."""
    BM: tl.constexpr = 64
    DTYPE: tl.constexpr = big_ptr.dtype.element_ty
    DOT: tl.constexpr = tl.float32 if INTERPRET else DTYPE
    first_col = tl.program_id(0) * BC
    col = first_col + tl.arange(0, BC)
    rank = tl.program_id(1) * BR + tl.arange(0, BR)
    step = tl.arange(0, BM)
    small_place = step[:, None] * small_stride + rank[None, :]
    big_place = step[:, None] * big_stride + col[None, :]
    acc = tl.zeros((BR, BC), tl.float32)
    for m in range(0, tl.cdiv(rows, BM)):
        row = m * BM + step
        inside = (row < rows)[:, None]
        first_row = tl.cast(m * BM, tl.int64)
        small = tl.load(
            small_ptr + first_row * small_stride + small_place,
            mask=inside & (rank < RANK)[None, :],
            other=0.0,
        )
        big = tl.load(big_ptr + first_row * big_stride + big_place, mask=inside, other=0.0)
        if DROPOUT:
            keep = keep_mask(seed_low, seed_high, row, first_col, drop_threshold, BM, BC)
            big = tl.where(keep, big, 0.0)
        acc = tl.dot(tl.trans(small).to(DOT), big.to(DOT), acc)
    inside = (rank < RANK)[:, None]
    if ROW_MAJOR:
        tl.store(out_ptr + rank[:, None] * C + col[None, :], acc * alpha, mask=inside)
    else:
        tl.store(out_ptr + rank[:, None] + col[None, :] * RANK, acc * alpha, mask=inside)
