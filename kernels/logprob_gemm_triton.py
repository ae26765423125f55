"""The kernels of linear_logprob that multiply with the head: each a GEMM with something in its epilogue.

Rows and words that a tile has too many are read as the last ones; what comes of them is masked or never
read. H is a multiple of 16. `vocab` words are cut into tiles of BN, of which a launch takes some.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _finite(m):
    """A maximum of -inf would make exp(z - m) NaN; 0 serves as well."""
    return tl.where(m == -float("inf"), 0.0, m)


@triton.jit
def _cap(z, softcap, inv_cap):
    """softcap * tanh(z / softcap), within a rounding or two of softcap."""
    return softcap - 2.0 * softcap / (1.0 + tl.exp(z * (2.0 * inv_cap)))


@triton.jit
def _above(centred):
    """-150 instead of a forbidden word's -inf: exp is 0 there as well, and 0 * -150 is no NaN."""
    return tl.maximum(centred, -150.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _slope(z, inv_cap):
    """dz / d(scaled logit), 1 without a cap (inv_cap = 0) and for forbidden words."""
    part = _finite(z) * inv_cap
    return 1.0 - part * part


@triton.jit
def _everywhere(scalar, block):
    # for masks: Triton 3.9's interpreter makes integers of a comparison that is spread later
    return tl.broadcast_to(scalar, block.shape)


@triton.jit
def _columns(H, BH: tl.constexpr):
    """Columns of this program's tile of H; those too many are 0, in whole groups of 16 as H is a multiple."""
    column = tl.program_id(0) * BH + tl.arange(0, BH)
    return tl.max_contiguous(tl.multiple_of(tl.where(column < H, column, 0), 16), 16)


@triton.jit
def _add(a, b, c, d):
    return a + c, b + d


@triton.jit
def _row_sums(a, b, INTERPRET: tl.constexpr):
    """Of both in one reduction, which takes fewer registers; Triton's interpreter is slow at those."""
    if INTERPRET:
        sums = tl.sum(a, 1), tl.sum(b, 1)
    else:
        sums = tl.reduce((a, b), 1, _add)
    return sums


@triton.jit
def _logits(
    h_ptr, w_ptr, bias_ptr, rows, vocab, H, first_row, first_word, has_bias, scale, softcap, inv_cap,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One [BM, BN] tile of z."""
    DOT: tl.constexpr = tl.float32 if INTERPRET else w_ptr.dtype.element_ty
    row = tl.minimum(tl.arange(0, BM), rows - 1 - first_row)
    word = tl.minimum(tl.arange(0, BN), vocab - 1 - first_word)
    step = tl.arange(0, BK)
    h_ptr += tl.cast(first_row, tl.int64) * H
    w_ptr += tl.cast(first_word, tl.int64) * H
    h_place = row[:, None] * H + step[None, :]
    w_place = word[:, None] * H + step[None, :]
    z = tl.zeros((BM, BN), tl.float32)
    for k in range(0, H, BK):
        inside = (step < H - k)[None, :]
        h = tl.load(h_ptr + h_place, mask=inside, other=0.0)
        w = tl.load(w_ptr + w_place, mask=inside, other=0.0)
        z = tl.dot(h.to(DOT), tl.trans(w).to(DOT), z)
        h_ptr += BK
        w_ptr += BK
    if has_bias != 0:
        z += tl.load(bias_ptr + first_word + word)[None, :]
    z *= scale
    if softcap > 0.0:
        z = _cap(z, softcap, inv_cap)
    return z


@triton.jit(do_not_specialize=["rows", "vocab", "first_tile", "has_bias"])
def _statistics_kernel(
    h_ptr, w_ptr, bias_ptr, label_ptr, max_ptr, sum_ptr, moment_ptr, p_ptr, rows, vocab, H, padded,
    first_tile, has_bias, scale, softcap, inv_cap,
    STORE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Statistics [tile, padded] of tile `first_tile + program_id(1)`, and P [program_id(1), padded, BN]."""
    first_row = tl.program_id(0) * BM
    tile = first_tile + tl.program_id(1)
    first_word = tile * BN
    z = _logits(
        h_ptr, w_ptr, bias_ptr, rows, vocab, H, first_row, first_word, has_bias, scale, softcap, inv_cap,
        BM, BN, BK, INTERPRET,
    )  # fmt: skip
    row = first_row + tl.arange(0, BM)
    word = tl.arange(0, BN)
    label = tl.load(label_ptr + row) - first_word
    counted = (word < vocab - first_word)[None, :] & (label[:, None] != word[None, :])
    z = tl.where(counted, z, -float("inf"))
    m = tl.max(z, 1)
    place = tl.cast(tile, tl.int64) * padded + row
    tl.store(max_ptr + place, m)
    m = _finite(m)
    total = tl.zeros((BM,), tl.float32)
    moment = tl.zeros((BM,), tl.float32)
    p_ptr += tl.cast(tl.program_id(1) * padded + first_row, tl.int64) * BN
    p_place = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN // 2)[None, :]
    # one half of the words after the other: z and exp(z) of all of them would not fit the registers
    halves = tl.split(tl.permute(tl.reshape(z, (BM, 2, BN // 2)), (0, 2, 1)))
    for half in tl.static_range(2):
        centred = _above(halves[half] - m[:, None])
        e = tl.exp(centred)
        capped = centred * inv_cap + (m * inv_cap)[:, None]
        p = (e - e * capped * capped).to(p_ptr.dtype.element_ty)
        part, part_moment = _row_sums(e, e * centred, INTERPRET)
        total += part
        moment += part_moment
        if STORE:
            tl.store(p_ptr + p_place + half * (BN // 2), p)
    tl.store(sum_ptr + place, total)
    tl.store(moment_ptr + place, moment)


@triton.jit(do_not_specialize=["rows", "vocab", "first_tile", "has_bias"])
def _logit_gradient_kernel(
    h_ptr, w_ptr, bias_ptr, label_ptr, logp_ptr, lse_ptr, grad_ptr, dz_ptr, rows, vocab, H, padded,
    first_tile, has_bias, scale, softcap, inv_cap,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """dz [program_id(1), BN, padded], 0 beyond the rows."""
    first_row = tl.program_id(0) * BM
    first_word = (first_tile + tl.program_id(1)) * BN
    z = _logits(
        h_ptr, w_ptr, bias_ptr, rows, vocab, H, first_row, first_word, has_bias, scale, softcap, inv_cap,
        BM, BN, BK, INTERPRET,
    )  # fmt: skip
    row = first_row + tl.arange(0, BM)
    lse = _finite(tl.load(lse_ptr + row))
    grad = tl.load(grad_ptr + row) * scale
    dz_ptr += tl.cast(tl.program_id(1) * BN, tl.int64) * padded + first_row
    dz_place = tl.arange(0, BN // 2)[:, None] * padded + tl.arange(0, BM)[None, :]
    halves = tl.split(tl.permute(tl.reshape(z, (BM, 2, BN // 2)), (0, 2, 1)))
    for half in tl.static_range(2):
        # p <= 1 holds the rows that are too many finite: their grad is 0, but their lse is not theirs
        centred = tl.minimum(_above(halves[half] - lse[:, None]), 0.0, propagate_nan=tl.PropagateNan.ALL)
        capped = centred * inv_cap + (lse * inv_cap)[:, None]
        dz = -grad[:, None] * tl.exp(centred) * (1.0 - capped * capped)
        tl.store(dz_ptr + half * (BN // 2) * padded + dz_place, tl.trans(dz.to(dz_ptr.dtype.element_ty)))
    tl.debug_barrier()  # then the labels' own, over what was just written
    label = tl.load(label_ptr + row) - first_word
    logp = tl.load(logp_ptr + row)
    dz = grad * (1.0 - tl.exp(logp)) * _slope(logp + lse, inv_cap)
    own = (label >= 0) & (label < BN)
    tl.store(dz_ptr + label * padded + tl.arange(0, BM), dz.to(dz_ptr.dtype.element_ty), mask=own)


@triton.jit(do_not_specialize=["vocab", "first_tile", "tiles", "per_split", "add"])
def _accumulate_kernel(
    p_ptr, w_ptr, factor_ptr, old_ptr, u_ptr, vocab, H, padded, first_tile, tiles, per_split, add,
    BM: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """U [split, column tile, padded, BH] = (add: old U +) sum_j P_j W_j, times factor[j] after each."""
    STEPS: tl.constexpr = BN // BK
    DOT: tl.constexpr = tl.float32 if INTERPRET else w_ptr.dtype.element_ty
    split = tl.program_id(2)
    first = split * per_split
    count = tl.minimum(tiles - first, per_split)
    first_row = tl.program_id(1) * BM
    row = first_row + tl.arange(0, BM)
    factor_ptr += first * padded
    step = tl.arange(0, BK)
    p_ptr += tl.cast(first * padded + first_row, tl.int64) * BN
    p_place = tl.arange(0, BM)[:, None] * BN + step[None, :]
    first_word = (first_tile + first) * BN
    w_ptr += tl.cast(first_word, tl.int64) * H
    column = _columns(H, BH)
    last = vocab - 1 - first_word
    acc = tl.zeros((BM, BH), tl.float32)
    for i in range(0, count * STEPS):
        p = tl.load(p_ptr + i // STEPS * (padded * BN) + i % STEPS * BK + p_place)
        # P is 0 for words that are too many
        w = tl.load(w_ptr + tl.minimum(step, last - i * BK)[:, None] * H + column[None, :])
        acc = tl.dot(p.to(DOT), w.to(DOT), acc)
        w_ptr += BK * H
        if i % STEPS == STEPS - 1:
            acc *= tl.load(factor_ptr + i // STEPS * padded + row)[:, None]
    u_ptr += tl.cast((split * tl.num_programs(0) + tl.program_id(0)) * padded + first_row, tl.int64) * BH
    u_place = tl.arange(0, BM)[:, None] * BH + tl.arange(0, BH // 2)[None, :]
    old = tl.load(old_ptr + split * padded + row)[:, None]
    halves = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BH // 2)), (0, 2, 1)))
    for half in tl.static_range(2):
        part_ptr = u_ptr + half * (BH // 2) + u_place
        before = tl.load(part_ptr, mask=_everywhere(add, part_ptr) != 0, other=0.0)
        tl.store(part_ptr, before * old + halves[half])


@triton.jit(do_not_specialize=["rows", "vocab", "first_tile", "add", "final"])
def _head_gradient_kernel(
    dz_ptr, h_ptr, partial_ptr, dw_ptr, rows, vocab, H, padded, first_tile, add, final,
    BN: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """dW [BV words, BH] = (add: partial +) dz^T h: into dw if `final`, else as fp32 into partial."""
    DOT: tl.constexpr = tl.float32 if INTERPRET else h_ptr.dtype.element_ty
    first_word = first_tile * BN + tl.program_id(1) * BV
    step = tl.arange(0, BK)
    dz_ptr += tl.cast(tl.program_id(1) * BV, tl.int64) * padded
    dz_place = tl.arange(0, BV)[:, None] * padded + step[None, :]
    h_place = step[:, None] * H + _columns(H, BH)[None, :]
    acc = tl.zeros((BV, BH), tl.float32)
    for i in range(0, tl.cdiv(rows, BK)):
        dz = tl.load(dz_ptr + dz_place)
        h = tl.load(h_ptr + h_place, mask=(step < rows - i * BK)[:, None], other=0.0)
        acc = tl.dot(dz.to(DOT), h.to(DOT), acc)
        dz_ptr += BK
        h_ptr += BK * H
    word = tl.arange(0, BV)[:, None]
    partial_ptr += tl.cast(tl.program_id(1) * BV, tl.int64) * H
    dw_ptr += tl.cast(first_word, tl.int64) * H
    halves = tl.split(tl.permute(tl.reshape(acc, (BV, 2, BH // 2)), (0, 2, 1)))
    for half in tl.static_range(2):
        column = tl.program_id(0) * BH + half * (BH // 2) + tl.arange(0, BH // 2)[None, :]
        wanted = (word < vocab - first_word) & (column < H)
        place = word * H + column
        begun, ended = _everywhere(add, place) != 0, _everywhere(final, place)
        total = halves[half] + tl.load(partial_ptr + place, mask=wanted & begun, other=0.0)
        tl.store(dw_ptr + place, total.to(dw_ptr.dtype.element_ty), mask=wanted & (ended != 0))
        tl.store(partial_ptr + place, total, mask=wanted & (ended == 0))
