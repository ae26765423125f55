"""Dropout's mask from a seed, the same in every kernel that needs it, never stored.

    bits[m, k] = Philox4x32-10(key = seed, counter = (k // 4, m, 0, 0))[k mod 4]
    keep[m, k] = (bits[m, k] >> 1) >= threshold,     threshold = round(p 2^31)

One Philox call gives four neighbours, so the mask costs a quarter of a call an element. Salmon et al.,
Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011).
"""

from __future__ import annotations

import triton
import triton.language as tl


def threshold(dropout_p: float) -> int:
    """P(keep) = 1 - threshold / 2^31, exact to 2^-32."""
    return min(round(dropout_p * 2**31), 2**31 - 1)


def seed_words(seed: int) -> tuple[int, int]:
    """A seed in [0, 2^63) as two words for the kernels' signed 32-bit arguments."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}, must be in [0, 2^63)")
    low, high = seed & 0xFFFFFFFF, seed >> 32
    return (low - 2**32 if low >= 2**31 else low), high


@triton.jit
def keep_mask(
    seed_low, seed_high, row, first_column, drop_threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """keep [ROWS, COLUMNS] for rows `row` [ROWS] and columns first_column ... (a multiple of 4)."""
    seed = (seed_high.to(tl.uint64) << 32) | (seed_low.to(tl.uint32, bitcast=True).to(tl.uint64))
    group = (first_column // 4 + tl.arange(0, COLUMNS // 4)).to(tl.uint32)
    zero = tl.zeros((ROWS, COLUMNS // 4), tl.uint32)
    a, b, c, d = tl.philox(seed, zero + group[None, :], zero + row[:, None].to(tl.uint32), zero, zero)
    bits = tl.join(tl.join(a, c), tl.join(b, d))  # [ROWS, COLUMNS / 4, 2, 2]
    bits = tl.reshape(bits, (ROWS, COLUMNS))
    return (bits >> 1).to(tl.int32, bitcast=True) >= drop_threshold
