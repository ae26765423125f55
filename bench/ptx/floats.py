"""Floating-point formats, rounding and functions, on arrays of one element per lane.

Generated code sees the names of this module as they are, so those of the numpy types are short.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
i1, i2, i4, i8 = np.int8, np.int16, np.int32, np.int64
f2, f4, f8, ld = np.float16, np.float32, np.float64, np.longdouble
where = np.where
SMALLEST_NORMAL = f4(1.1754944e-38)


def ftz(x: Array) -> Array:
    """Flush subnormal float32 to zero."""
    return where(np.abs(x) < SMALLEST_NORMAL, np.copysign(f4(0), x), x)


def bf2f(x: Array) -> Array:
    """Bits of bfloat16 -> float32."""
    return (x.astype(u4) << 16).view(f4)


def bf_round(x: Array) -> Array:
    """float32 -> u4 with the bfloat16, rounded to nearest even, in its upper half."""
    bits = x.view(u4)
    rounded = bits + (((bits >> 16) & u4(1)) + u4(0x7FFF))
    return where(np.isnan(x), u4(0x7FFF0000), rounded)


def f2bf(x: Array, mode: str = "rn") -> Array:
    """float32 -> bits of bfloat16."""
    if mode == "rz":
        return where(np.isnan(x), u2(0x7FFF), (x.view(u4) >> 16).astype(u2))
    return (bf_round(x) >> 16).astype(u2)


def f2h(x: Array, mode: str = "rn") -> Array:
    """float32 or float64 -> bits of float16."""
    half = x.astype(f2)
    if mode == "rz":
        half = where(np.abs(half.astype(f4)) > np.abs(x), np.nextafter(half, f2(0)), half)
    half = where(np.isnan(half), u2(0x7FFF).view(f2), half)
    return half.view(u2)


def directed(x: Array, mode: str) -> Array:
    """float64 -> float32 rounded by rn, rz, rm or rp."""
    nearest = x.astype(f4)
    if mode == "rn":
        return nearest
    exact = nearest.astype(f8)
    if mode == "rz":
        return where(np.abs(exact) > np.abs(x), np.nextafter(nearest, f4(0)), nearest)
    if mode == "rm":
        return where(exact > x, np.nextafter(nearest, f4(-np.inf)), nearest)
    return where(exact < x, np.nextafter(nearest, f4(np.inf)), nearest)


def rna_tf32(x: Array) -> Array:
    """float32 -> bits of tf32, ties away from zero."""
    bits = x.view(u4)
    return where(np.isfinite(x), (bits + u4(0x1000)) & u4(0xFFFFE000), bits)


def rn_tf32(x: Array) -> Array:
    """float32 -> bits of tf32, ties to even."""
    bits = x.view(u4)
    return where(np.isfinite(x), (bits + u4(0xFFF) + ((bits >> 13) & u4(1))) & u4(0xFFFFE000), bits)


def _fp8_tables() -> tuple[Array, Array]:
    byte = np.arange(256)
    sign, magnitude = where(byte & 128, -1.0, 1.0), byte & 127
    exponent, mantissa = magnitude >> 3, magnitude & 7
    e4m3 = where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    e4m3[magnitude == 127] = np.nan
    exponent, mantissa = magnitude >> 2, magnitude & 3
    e5m2 = where(exponent == 0, mantissa * 2.0**-16, (1 + mantissa / 4) * 2.0 ** (exponent - 15.0))
    e5m2[exponent == 31] = where(mantissa[exponent == 31] == 0, np.inf, np.nan)
    return (sign * e4m3).astype(f4), (sign * e5m2).astype(f4)


E4M3, E5M2 = _fp8_tables()


def to_fp8(x: Array, kind: str) -> Array:
    """float32 -> bytes of fp8, to nearest even, saturating at the largest finite value."""
    table = (E4M3[:127] if kind == "e4m3" else E5M2[:124]).astype(f8)
    magnitude = np.minimum(np.abs(x.astype(f8)), table[-1])
    above = np.clip(np.searchsorted(table, magnitude), 1, len(table) - 1)
    low, high = magnitude - table[above - 1], table[above] - magnitude
    down = (low < high) | ((low == high) & ((above - 1) % 2 == 0))
    code = where(np.isnan(x), 127, where(down, above - 1, above))
    return (code | where(np.signbit(x), 128, 0)).astype(u1)


def fma4(a: Array, b: Array, c: Array) -> Array:
    """float32 fma by way of float64: the product is exact, a double rounding happens about once in 2^29."""
    product = np.multiply(a, b, dtype=f8)
    total: Array = product + c
    return total.astype(f4)


def fma8(a: Array, b: Array, c: Array) -> Array:
    """float64 fma by way of the machine's long double."""
    total: Array = np.multiply(a, b, dtype=ld) + c
    return total.astype(f8)


def h_un(fn: Callable[[Array], Array], a: Array) -> Array:
    """A function of bits of float16, computed in float32."""
    return f2h(fn(a.view(f2).astype(f4)))


def h_bin(fn: Callable[[Array, Array], Array], a: Array, b: Array) -> Array:
    """A function of two bits of float16, computed in float32."""
    return f2h(fn(a.view(f2).astype(f4), b.view(f2).astype(f4)))


def h_fma(a: Array, b: Array, c: Array) -> Array:
    """fma of bits of float16."""
    return f2h(np.multiply(a.view(f2), b.view(f2), dtype=f8) + c.view(f2))


def bf_un(fn: Callable[[Array], Array], a: Array) -> Array:
    """A function of bits of bfloat16, computed in float32."""
    return f2bf(fn(bf2f(a)))


def bf_bin(fn: Callable[[Array, Array], Array], a: Array, b: Array) -> Array:
    """A function of two bits of bfloat16, computed in float32."""
    return f2bf(fn(bf2f(a), bf2f(b)))


def bf_fma(a: Array, b: Array, c: Array) -> Array:
    """fma of bits of bfloat16."""
    return f2bf(fma4(bf2f(a), bf2f(b), bf2f(c)))


def relu(x: Array) -> Array:
    """max(x, 0); NaN stays."""
    return np.maximum(x, x.dtype.type(0))


def rcp(x: Array) -> Array:
    """1 / x in float32."""
    return f4(1) / x


def rsqrt4(x: Array) -> Array:
    """1 / sqrt(x), correctly rounded up to a double rounding."""
    return (1.0 / np.sqrt(x.astype(f8))).astype(f4)


def sin4(x: Array) -> Array:
    """sin, correctly rounded up to a double rounding."""
    return np.sin(x.astype(f8)).astype(f4)


def cos4(x: Array) -> Array:
    """cos, correctly rounded up to a double rounding."""
    return np.cos(x.astype(f8)).astype(f4)


def sat01(x: Array) -> Array:
    """Clamp to [0, 1]; NaN becomes 0."""
    return where(np.isnan(x), x.dtype.type(0), np.clip(x, x.dtype.type(0), x.dtype.type(1)))


_ROUNDINGS = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


def f2int(x: Array, dtype: type[Any], mode: str) -> Array:
    """Round by mode and clamp; NaN becomes 0, in 64 signed bits their smallest."""
    nan = np.isnan(x)
    rounded = where(nan, 0.0, _ROUNDINGS[mode](x.astype(f8)))
    info = np.iinfo(dtype)
    high, low = rounded >= float(info.max), rounded <= float(info.min)
    inside = where(high | low, 0.0, rounded).astype(dtype)
    clamped = where(high, dtype(info.max), where(low, dtype(info.min), inside))
    return where(nan, dtype(info.min) if dtype is i8 else dtype(0), clamped)
