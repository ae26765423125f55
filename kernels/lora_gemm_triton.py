"""The two products with the base weight, each with its low-rank term in the same accumulator.

    y  = x W^T + bias + xa (scaling B)^T         `_forward_kernel`       reduces over K
    dx = dy W + keep / (1 - p) * (g A)           `_input_grad_kernel`    reduces over N

Addresses are a 64-bit base that advances and 32-bit places within the tile: a load then costs two
instructions beside itself where pointers that advance cost five. Places past the last row repeat the last
row instead of being masked. `docs/kernels.md` has the instruction counts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dropout_triton import keep_mask
from .nf4_triton import decode, lane_table, load_absmax, pin


@triton.jit
def _tile(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tile (m, n) of program `pid`: bands of GROUP row tiles, neighbours share operands in L2."""
    band = pid // (GROUP * tiles_n)
    first = band * GROUP
    height = min(tiles_m - first, GROUP)
    inside = pid % (GROUP * tiles_n)
    return first + inside % height, inside // height


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x_ptr, packed_ptr, absmax_ptr, code_ptr, absmax_code_ptr, absmax_scale_ptr, absmax_offset_ptr,
    xa_ptr, lora_b_ptr, bias_ptr, y_ptr, scaling, rows, N, K, x_stride, xa_stride,
    RANK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, NF4: tl.constexpr, NESTED: tl.constexpr,
    NESTED_BLOCK: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr, GROUP: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """y = x W^T + xa (scaling B)^T + bias for one [BM, BN] tile."""
    BK: tl.constexpr = 64
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    DOT: tl.constexpr = tl.float32 if INTERPRET else DTYPE
    pid_m, pid_n = _tile(tl.program_id(0), tl.cdiv(rows, BM), tl.cdiv(N, BN), GROUP)
    row = tl.minimum(
        tl.arange(0, BM), rows - 1 - pid_m * BM
    )  # within the tile; the last row again past the end
    col = tl.minimum(tl.arange(0, BN), N - 1 - pid_n * BN)
    step = tl.arange(0, BK)
    x_base = x_ptr + (pid_m * BM).to(tl.int64) * x_stride
    x_place = row[:, None] * x_stride + step[None, :]
    if NF4:
        K8 = K // 64 * 8
        w_base = packed_ptr + (pid_n * BN).to(tl.int64) * K8
        w_place = col[:, None] * K8 + tl.arange(0, BK // 8)[None, :]
        table = lane_table(code_ptr, BN, BK // 8, INTERPRET)
        block = (pid_n * BN + col) * (K // BLOCK)
        offset = tl.load(absmax_offset_ptr) if NESTED else 0.0
    else:
        w_base = packed_ptr + (pid_n * BN).to(tl.int64) * K
        w_place = col[:, None] * K + step[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K // BK):
        x = tl.load(x_base + x_place)
        if NF4:
            packed = tl.load(w_base + w_place)
            absmax = load_absmax(
                absmax_ptr, absmax_code_ptr, absmax_scale_ptr, offset, block + k // (BLOCK // 64), NESTED,
                NESTED_BLOCK,
            )  # fmt: skip
            weight = decode(packed, absmax[:, None], table, code_ptr, BN, BK // 8, DTYPE, INTERPRET)
            weight = pin(weight, INTERPRET)
            w_base += BK // 8
        else:
            weight = tl.load(w_base + w_place)
            w_base += BK
        acc = tl.dot(x.to(DOT), tl.trans(weight).to(DOT), acc)
        x_base += BK
    BR: tl.constexpr = 16 if RANK <= 16 else (32 if RANK <= 32 else 64)
    xa_base = xa_ptr + (pid_m * BM).to(tl.int64) * xa_stride
    b_base = lora_b_ptr + (pid_n * BN).to(tl.int64) * RANK
    for first in tl.range(0, RANK, BR, num_stages=1):
        rank = first + tl.arange(0, BR)
        inside = rank[None, :] < RANK
        xa = tl.load(xa_base + row[:, None] * xa_stride + rank[None, :], mask=inside, other=0.0)
        lora_b = tl.load(b_base + col[:, None] * RANK + rank[None, :], mask=inside, other=0.0)
        lora_b = (lora_b.to(tl.float32) * scaling).to(DTYPE)
        acc = tl.dot(xa.to(DOT), tl.trans(lora_b).to(DOT), acc)
    if BIAS:
        acc += tl.load(bias_ptr + pid_n * BN + col).to(tl.float32)[None, :]
    out_row, out_col = pid_m * BM + tl.arange(0, BM), pid_n * BN + tl.arange(0, BN)
    place = out_row[:, None].to(tl.int64) * N + out_col[None, :]
    tl.store(y_ptr + place, acc.to(DTYPE), mask=(out_row[:, None] < rows) & (out_col[None, :] < N))


@triton.jit(do_not_specialize=["rows", "seed_low", "seed_high", "drop_threshold"])
def _input_grad_kernel(
    dy_ptr, packed_ptr, absmax_ptr, code_ptr, absmax_code_ptr, absmax_scale_ptr, absmax_offset_ptr,
    g_ptr, lora_a_ptr, dx_ptr, rows, N, K, dy_stride, seed_low, seed_high, drop_threshold, keep_scale,
    RANK: tl.constexpr, DROPOUT: tl.constexpr, ADD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    NF4: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
    GROUP: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """dx = (ADD: dx +) dy W + keep / (1 - p) * (g A) for one [BM, BN] tile of [M, K].

    RANK 0 leaves the low-rank term out: the layers of a group but the first.
    """
    BK: tl.constexpr = 64
    DTYPE: tl.constexpr = dy_ptr.dtype.element_ty
    DOT: tl.constexpr = tl.float32 if INTERPRET else DTYPE
    pid_m, pid_k = _tile(tl.program_id(0), tl.cdiv(rows, BM), tl.cdiv(K, BN), GROUP)
    row = tl.minimum(tl.arange(0, BM), rows - 1 - pid_m * BM)
    col = pid_k * BN + tl.arange(0, BN)
    out_row = pid_m * BM + tl.arange(0, BM)
    place = out_row[:, None].to(tl.int64) * K + col[None, :]
    inside_out = (out_row[:, None] < rows) & (col[None, :] < K)
    acc = tl.zeros((BM, BN), tl.float32)
    if RANK > 0:
        BR: tl.constexpr = 16 if RANK <= 16 else (32 if RANK <= 32 else 64)
        g_base = g_ptr + (pid_m * BM).to(tl.int64) * RANK
        for first in tl.range(0, RANK, BR, num_stages=1):
            rank = first + tl.arange(0, BR)
            g = tl.load(g_base + row[:, None] * RANK + rank[None, :], mask=rank[None, :] < RANK, other=0.0)
            lora_a = tl.load(
                lora_a_ptr + rank[:, None] * K + col[None, :],
                mask=(rank[:, None] < RANK) & (col[None, :] < K), other=0.0,
            )  # fmt: skip
            acc = tl.dot(g.to(DOT), lora_a.to(DTYPE).to(DOT), acc)
        if DROPOUT:
            keep = keep_mask(seed_low, seed_high, out_row, pid_k * BN, drop_threshold, BM, BN)
            acc = tl.where(keep, acc * keep_scale, 0.0)
    if ADD:
        acc += tl.load(dx_ptr + place, mask=inside_out, other=0.0).to(tl.float32)
    step = tl.arange(0, BK)
    dy_base = dy_ptr + (pid_m * BM).to(tl.int64) * dy_stride
    dy_place = row[:, None] * dy_stride + step[None, :]
    if NF4:
        K8 = K // 64 * 8
        part = tl.arange(0, BN // 64)  # 64 columns share an absmax
        part_col = tl.minimum(pid_k * (BN // 64) + part, K // 64 - 1)
        word = part_col[:, None] * 8 + tl.arange(0, 8)[None, :]
        w_place = step[:, None, None] * K8 + word[None, :, :]
        w_base = packed_ptr
        table = lane_table(code_ptr, BK, BN // 8, INTERPRET)
        block = step[:, None] * (K // BLOCK) + part_col[None, :] // (BLOCK // 64)
        offset = tl.load(absmax_offset_ptr) if NESTED else 0.0
    else:
        w_base = packed_ptr
        w_place = step[:, None] * K + col[None, :]
    for _ in range(0, N // BK):
        dy = tl.load(dy_base + dy_place)
        if NF4:
            packed = tl.load(w_base + w_place)
            absmax = load_absmax(
                absmax_ptr, absmax_code_ptr, absmax_scale_ptr, offset, block, NESTED, NESTED_BLOCK
            )
            absmax = tl.broadcast_to(absmax[:, :, None], (BK, BN // 64, 8))
            weight = decode(
                tl.reshape(packed, (BK, BN // 8)), tl.reshape(absmax, (BK, BN // 8)), table, code_ptr, BK,
                BN // 8, DTYPE, INTERPRET,
            )  # fmt: skip
            weight = pin(weight, INTERPRET)
            w_base += (BK * K8).to(tl.int64)
            block += BK * (K // BLOCK)
        else:
            weight = tl.load(w_base + w_place, mask=(col < K)[None, :], other=0.0)
            w_base += (BK * K).to(tl.int64)
        acc = tl.dot(dy.to(DOT), weight.to(DOT), acc)
        dy_base += BK
    tl.store(dx_ptr + place, acc.to(DTYPE), mask=inside_out)
