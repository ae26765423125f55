"""What PTX's integer and bit instructions compute, on arrays of one element per lane."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .floats import Array, i1, i8, u1, u2, u4, u8, where


def sat_int(x: Array, dtype: type[Any]) -> Array:
    """Clamp to the range of an integer type."""
    to, given = np.iinfo(dtype), np.iinfo(x.dtype)
    low, high = max(to.min, given.min), min(to.max, given.max)
    return np.clip(x, x.dtype.type(low), x.dtype.type(high)).astype(dtype)


def mulhi_u8(a: Array, b: Array) -> Array:
    """Upper 64 bits of an unsigned product."""
    low = u8(0xFFFFFFFF)
    a0, a1, b0, b1 = a & low, a >> u8(32), b & low, b >> u8(32)
    p, q = a1 * b0, a0 * b1
    middle = ((a0 * b0) >> u8(32)) + (p & low) + (q & low)
    high: Array = a1 * b1 + (p >> u8(32)) + (q >> u8(32)) + (middle >> u8(32))
    return high


def mulhi_i8(a: Array, b: Array) -> Array:
    """Upper 64 bits of a signed product; operands and result are bits in u8."""
    correction: Array = where(a.view(i8) < 0, b, u8(0)) + where(b.view(i8) < 0, a, u8(0))
    return mulhi_u8(a, b) - correction


def tdiv(a: Array, b: Array) -> Array:
    """Division truncating towards zero; by zero it gives all ones, as the GPU does."""
    zero = b == 0
    quotient = a // where(zero, b.dtype.type(1), b)
    if a.dtype.kind == "i":
        quotient = quotient + ((quotient < 0) & (quotient * b != a)).astype(a.dtype)
        return where(zero, ~a.dtype.type(0), quotient).astype(a.dtype)
    return where(zero, np.iinfo(a.dtype).max, quotient).astype(a.dtype)


def trem(a: Array, b: Array) -> Array:
    """Remainder of tdiv; by zero it gives a."""
    divisor = where(b == 0, b.dtype.type(1), b)
    return where(b == 0, a, a - tdiv(a, divisor) * divisor).astype(a.dtype)


def _low_mask(count: Array, dtype: Any, bits: int) -> Array:
    """So many ones, at the lower end."""
    return where(count < bits, (dtype(1) << np.minimum(count, dtype(bits - 1))) - dtype(1), ~dtype(0))


def bfe(a: Array, position: Array, length: Array, signed: bool, bits: int) -> Array:
    """Bit field extract."""
    dtype: Any = u8 if bits == 64 else u4
    pos, n = (np.asarray(x).astype(dtype) & dtype(255) for x in (position, length))
    source = a.view(dtype)
    field = (source >> np.minimum(pos, dtype(bits))) & _low_mask(n, dtype, bits)
    if not signed:
        return field
    sign = (source >> np.minimum(pos + n - dtype(1), dtype(bits - 1))) & dtype(1)
    available = where(pos < bits, dtype(bits) - np.minimum(pos, dtype(bits)), dtype(0))
    low = _low_mask(np.minimum(n, available), dtype, bits)
    extended = where(sign == 1, (field & low) | ~low, field & low)
    return where(n == 0, dtype(0), extended)


def bfi(a: Array, b: Array, position: Array, length: Array, bits: int) -> Array:
    """Bit field insert: a into b."""
    dtype: Any = u8 if bits == 64 else u4
    pos, n = (np.asarray(x).astype(dtype) & dtype(255) for x in (position, length))
    shift = np.minimum(pos, dtype(bits))
    mask = _low_mask(n, dtype, bits) << shift
    result: Array = (b & ~mask) | ((a << shift) & mask)
    return result


def lop3(a: Array, b: Array, c: Array, lut: int) -> Array:
    """Any function of three bits, by its truth table."""
    result: Array | None = None
    for i in range(8):
        if lut >> i & 1:
            term = (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
            result = term if result is None else result | term
    return (a & u4(0)) if result is None else result


Lop3 = Callable[[Array, Array, Array], Array]
_LOP3: dict[int, Lop3] = {
    0x80: lambda a, b, c: a & b & c,
    0xFE: lambda a, b, c: a | b | c,
    0x96: lambda a, b, c: a ^ b ^ c,
    0xF8: lambda a, b, c: a | (b & c),
    0xEA: lambda a, b, c: (a & b) | c,
    0xCA: lambda a, b, c: (a & b) | (~a & c),
    0xE8: lambda a, b, c: (a & b) | (a & c) | (b & c),
    0xC0: lambda a, b, _: a & b,
    0x6A: lambda a, b, c: (a & b) ^ c,
    0x78: lambda a, b, c: a ^ (b & c),
    0xE2: lambda a, b, c: (a & b) | (c & ~b),
}


def lop3_fn(lut: int) -> Lop3:
    """lop3 with its table fixed, in few operations where the table is a frequent one."""
    return _LOP3.get(lut) or (lambda a, b, c: lop3(a, b, c, lut))


def prmt_const(a: Array, b: Array, selector: int) -> Array:
    """prmt (default mode) with a constant selector, as shifts and masks."""
    terms: list[Array] = []
    groups: dict[tuple[int, int], list[int]] = {}
    for i in range(4):
        nibble = selector >> 4 * i & 0xF
        source, byte = (b if nibble & 4 else a), nibble & 3
        if nibble & 8:
            terms.append(((source >> u4(8 * byte + 7)) & u4(1)) * u4(0xFF << 8 * i))
        else:
            groups.setdefault((nibble & 4, 8 * (i - byte)), []).append(i)
    for (which, shift), bytes_ in groups.items():
        source = b if which else a
        if np.ndim(source) == 0 and source == 0:
            continue
        term = source << u4(shift) if shift > 0 else source >> u4(-shift) if shift < 0 else source
        if len(bytes_) < 4:
            term = term & u4(sum(0xFF << 8 * i for i in bytes_))
        terms.append(term)
    if not terms:
        return a & u4(0)
    result = terms[0]
    for term in terms[1:]:
        result = result | term
    return result


def prmt(a: Array, b: Array, c: Array, mode: str = "") -> Array:
    """Byte permute, in all modes."""
    a, b, c = (np.asarray(x, u4) for x in (a, b, c))
    source = a.astype(u8) | b.astype(u8) << u8(32)
    result = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), u4)
    k = c & u4(3)
    for i in range(4):
        selected = {
            "": (c >> u4(4 * i)) & u4(0xF),
            "f4e": k + u4(i),
            "b4e": (k - u4(i)) & u4(7),
            "rc8": k,
            "ecl": np.maximum(k, u4(i)),
            "ecr": np.minimum(k, u4(i)),
            "rc16": (k & u4(1)) * u4(2) + u4(i & 1),
        }[mode]
        byte = ((source >> (u8(8) * (selected & u4(7)).astype(u8))) & u8(0xFF)).astype(u4)
        replicated = where(byte & u4(0x80), u4(0xFF), u4(0))
        result |= where(selected & u4(8), replicated, byte) << u4(8 * i)
    return result


def shf(low: Array, high: Array, count: Array, left: bool, wrap: bool) -> Array:
    """Funnel shift."""
    count = np.asarray(count, u4)
    n = (count & u4(31) if wrap else np.minimum(count, u4(32))).astype(u8)
    both = low.astype(u8) | high.astype(u8) << u8(32)
    return ((both << n) >> u8(32)).astype(u4) if left else (both >> n).astype(u4)


def clz(x: Array, bits: int) -> Array:
    """Leading zeros."""
    x = x.astype(u8)
    log2 = np.zeros(x.shape, u4)
    for step in (32, 16, 8, 4, 2, 1):
        big = x >= u8(1 << step)
        log2 += where(big, u4(step), u4(0))
        x = where(big, x >> u8(step), x)
    return u4(bits - 1) - log2 + (x == 0).astype(u4)


def brev(x: Array) -> Array:
    """Bits in reversed order."""
    for shift, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF)):
        x = ((x >> u4(shift)) & u4(mask)) | ((x & u4(mask)) << u4(shift))
    result: Array = x >> u4(16) | x << u4(16)
    return result


def popc(x: Array) -> Array:
    """Number of ones."""
    return np.bitwise_count(x).astype(u4)


def dp4a(a: Array, b: Array, c: Array, signed_a: bool, signed_b: bool) -> Array:
    """c plus the dot product of four bytes each."""
    total = np.asarray(c, u4).astype(i8)
    for i in range(4):
        x, y = (
            (np.asarray(v, u4) >> u4(8 * i)).astype(u1).view(i1 if signed else u1).astype(i8)
            for v, signed in ((a, signed_a), (b, signed_b))
        )
        total = total + x * y
    return total.astype(u8).astype(u4)


def transpose8x8(x: Array) -> Array:
    """movmatrix: each warp's 8 x 8 matrix of 16-bit elements, transposed."""
    rows = x.view(u2).reshape(-1, 8, 8)
    return np.ascontiguousarray(rows.transpose(0, 2, 1)).view(u4).ravel()


def shfl_source(lane: Array, mode: str, b: Any, c: Any) -> tuple[Array, Array]:
    """(source lane, predicate) of shfl.sync by the PTX definition; `lane` is 0..31."""
    b, clamp, segment = b & 31, c & 31, (c >> 8) & 31
    lowest = lane & segment
    highest = lowest | (clamp & ~segment & 31)
    if mode == "up":
        source = lane - b
        inside = source >= highest
    else:
        source = {"down": lane + b, "bfly": lane ^ b, "idx": lowest | (b & ~segment & 31)}[mode]
        inside = source <= highest
    return where(inside, source, lane), inside
