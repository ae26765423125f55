"""The kernels of linear_logprob that go over rows: how they are rescaled, and their results in the end."""

from __future__ import annotations

import triton
import triton.language as tl

from .logprob_gemm_triton import _above, _cap, _everywhere, _finite, _slope


@triton.jit(do_not_specialize=["first_tile", "tiles", "per_split", "add"])
def _units_kernel(
    max_ptr, running_ptr, factor_ptr, old_ptr, padded, first_tile, tiles, per_split, add, BM: tl.constexpr
):
    """What `_accumulate_kernel` multiplies its rows with, of one split [program_id(1)] of the chunk's tiles.

    Its accumulator is in units of exp(m_j) of the tile j that it is at, so that P_j enters as it is, and
    factor[j] = exp(unit_j - unit_{j+1}), the last unit being grown, the maximum up to here. A tile far below
    the row's maximum would let it overflow: no unit is below exp(grown - 40), and what such a tile then
    counts too much, BN exp(-40) of the softmax at most, is far below the resolution of fp32.
    old = exp(running - grown) is for U.
    """
    split = tl.program_id(1)
    first = split * per_split
    count = tl.minimum(tiles - first, per_split)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    place = split * padded + row
    max_ptr += tl.cast(first_tile + first, tl.int64) * padded
    running = tl.load(running_ptr + place, mask=_everywhere(add, row) != 0, other=-float("inf"))
    grown = running
    for j in range(0, count):
        grown = tl.maximum(grown, tl.load(max_ptr + tl.cast(j, tl.int64) * padded + row))
    tl.store(running_ptr + place, grown)
    grown = _finite(grown)
    tl.store(old_ptr + place, tl.exp(running - grown))
    factor_ptr += first * padded
    unit = tl.maximum(tl.load(max_ptr + row, mask=_everywhere(count, row) > 0, other=0.0), grown - 40.0)
    for j in range(0, count):
        further = _everywhere(count, row) > j + 1
        following = tl.load(max_ptr + tl.cast(j + 1, tl.int64) * padded + row, mask=further, other=0.0)
        following = tl.where(further, tl.maximum(following, grown - 40.0), grown)
        tl.store(factor_ptr + j * padded + row, tl.exp(unit - following))
        unit = following


@triton.jit(do_not_specialize=["rows", "tiles", "splits", "has_bias"])
def _finish_kernel(
    h_ptr, w_ptr, bias_ptr, label_ptr, place_ptr, max_ptr, sum_ptr, moment_ptr, running_ptr, weighted_ptr,
    logp_ptr, lse_ptr, entropy_ptr, u_ptr, rows, H, padded, tiles, splits, has_bias, scale, softcap, inv_cap,
    WANT_U: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Results of BM rows, written to their places among all rows.

    z_y is a float32 dot product. With the others' statistics relative to m, the maximum over all words,
        total = sum_v exp(z_v - m),  logp = z_y - m - log(total),  entropy = log(total) - sum_v p_v (z_v - m)
        u = scale (slope_y (1 - p_y) W_y - sum_splits exp(running - m) / total U)
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = row < rows
    label = tl.maximum(tl.load(label_ptr + row), 0).to(tl.int64)
    h_ptr += tl.cast(tl.minimum(row, rows - 1), tl.int64)[:, None] * H
    w_ptr += label[:, None] * H
    column = tl.arange(0, BH)[None, :]
    dot = tl.zeros((BM, BH), tl.float32)
    for first in range(0, H, BH):
        within = column < H - first
        h = tl.load(h_ptr + first + column, mask=within, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + first + column, mask=within, other=0.0).to(tl.float32)
        dot += h * w
    z = tl.sum(dot, 1)
    if has_bias != 0:
        z += tl.load(bias_ptr + label)
    z *= scale
    if softcap > 0.0:
        z = _cap(z, softcap, inv_cap)

    tile = tl.arange(0, BT)
    place = tile[:, None] * padded + row[None, :]
    grown = tl.full((BT, BM), -float("inf"), tl.float32)
    for first in range(0, tiles, BT):
        within = (tile < tiles - first)[:, None]
        offset = tl.cast(first, tl.int64) * padded
        grown = tl.maximum(grown, tl.load(max_ptr + offset + place, mask=within, other=-float("inf")))
    m = _finite(tl.maximum(tl.max(grown, 0), z))
    rest = tl.zeros((BT, BM), tl.float32)
    moment = tl.zeros((BT, BM), tl.float32)
    for first in range(0, tiles, BT):
        within = (tile < tiles - first)[:, None]
        offset = tl.cast(first, tl.int64) * padded
        top = tl.load(max_ptr + offset + place, mask=within, other=-float("inf"))
        centre = _above(top - m[None, :])
        s = tl.load(sum_ptr + offset + place, mask=within, other=0.0)
        q = tl.load(moment_ptr + offset + place, mask=within, other=0.0)
        weight = tl.exp(centre)
        rest += s * weight
        moment += weight * (q + centre * s)
    others = tl.sum(rest, 0)
    own_centre = _above(z - m)
    e = tl.exp(own_centre)
    total = others + e
    spread = tl.sum(moment, 0) + e * own_centre
    log_total = tl.log(total)
    target = tl.load(place_ptr + row, mask=inside, other=0)
    tl.store(logp_ptr + target, z - m - log_total, mask=inside)
    tl.store(lse_ptr + target, m + log_total, mask=inside)
    tl.store(entropy_ptr + target, log_total - spread / total, mask=inside)

    if WANT_U:
        own = others / total * _slope(z, inv_cap) * scale  # 1 - p_y without cancellation
        u_ptr += target[:, None] * H
        columns = tl.cdiv(H, BH)
        place = row[:, None] * BH + column
        for tile in range(0, columns):
            within = column < H - tile * BH
            w = tl.load(w_ptr + tile * BH + column, mask=within, other=0.0).to(tl.float32)
            u = own[:, None] * w
            for split in range(0, splits):
                factor = tl.exp(tl.load(running_ptr + split * padded + row) - m) / total * scale
                offset = tl.cast(split * columns + tile, tl.int64) * padded * BH
                u -= factor[:, None] * tl.load(weighted_ptr + offset + place)
            wanted = inside[:, None] & within
            tl.store(u_ptr + tile * BH + column, u.to(u_ptr.dtype.element_ty), mask=wanted)
