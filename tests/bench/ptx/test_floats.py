"""Floating-point instructions: rounding, NaN, conversions."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.bench.ptx.assembly import THREADS, Array, execute, words

DRAW = np.random.default_rng(1)


def bits(values: Array) -> Array:
    """Of float32."""
    return np.ascontiguousarray(values, np.float32).view(np.uint32)


def samples() -> Array:
    """float32 of all sizes, with the special ones."""
    drawn = words(DRAW).view(np.float32)
    drawn[:8] = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 65504, 65520]
    return drawn


def half_bits(values: Array, dtype: torch.dtype) -> Array:
    """What torch rounds to."""
    return (
        torch.from_numpy(values.copy()).to(dtype).view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
    )


def test_comparisons_and_nan() -> None:
    f, g = (DRAW.standard_normal(THREADS).astype(np.float32) for _ in range(2))
    f[::7] = np.nan
    g[::5] = f[::5]
    nan = np.isnan(f) | np.isnan(g)
    cases = {
        **{"lt": f < g, "ltu": (f < g) | nan, "eq": f == g, "equ": (f == g) | nan, "ne": (f != g) & ~nan},
        **{"neu": (f != g) | nan, "geu": (f >= g) | nan, "num": ~nan, "nan": nan},
    }
    for name, want in cases.items():
        got = execute(f"setp.{name}.f32 %q0, %a0, %a1; selp.b32 %o, 7, 9, %q0;", bits(f), bits(g))
        assert (got == np.where(want, 7, 9)).all(), name
    got = execute("set.gt.u32.f32 %o, %a0, %a1;", bits(f), bits(g))
    assert (got == np.where(f > g, 0xFFFFFFFF, 0)).all()


def test_two_predicates_at_once() -> None:
    a = DRAW.integers(0, 10, THREADS).astype(np.uint32)
    body = "setp.gt.u32 %q0, %a0, 7; setp.lt.and.u32 %q1|%q2, %a0, 5, !%q0; selp.b32 %t0, 1, 0, %q1;"
    got = execute(body + "selp.b32 %t1, 2, 0, %q2; or.b32 %o, %t0, %t1;", a)
    assert (got == np.where(a > 7, 0, np.where(a < 5, 1, 2))).all()


def test_min_max_and_nan() -> None:
    f, g = (np.tile(values, THREADS // 4) for values in ([1, np.nan, 2, np.nan], [np.nan, 3, 1, np.nan]))
    got = execute("max.f32 %o, %a0, %a1;", bits(f), bits(g)).view(np.float32)[:4]
    np.testing.assert_array_equal(got, [1, 3, 2, np.nan])
    got = execute("max.NaN.f32 %o, %a0, %a1;", bits(f), bits(g)).view(np.float32)[:4]
    np.testing.assert_array_equal(got, [np.nan, np.nan, 2, np.nan])


def test_fma_rounds_once() -> None:
    a = (1 + DRAW.random(THREADS) * 1e-3).astype(np.float32)
    square = a.astype(np.float64) ** 2
    c = -square.astype(np.float32)
    got = execute("fma.rn.f32 %o, %a0, %a0, %a1;", bits(a), bits(c)).view(np.float32)
    assert (got == (square + c).astype(np.float32)).all()
    assert (got != 0).any()
    twice = execute("mul.rn.f32 %t0, %a0, %a0; add.rn.f32 %o, %t0, %a1;", bits(a), bits(c)).view(np.float32)
    assert (twice == 0).all()


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
def test_directed_rounding(mode: str) -> None:
    scale = 10.0 ** DRAW.integers(-3, 4, THREADS)
    a, b = ((DRAW.standard_normal(THREADS) * scale).astype(np.float32) for _ in range(2))
    got = execute(f"mul.{mode}.f32 %o, %a0, %a1;", bits(a), bits(b)).view(np.float32)
    for x, y, rounded in zip(a.tolist(), b.tolist(), got, strict=True):
        exact, result = Fraction(x) * Fraction(y), Fraction(float(rounded))
        towards = np.float32(np.inf if exact > result else -np.inf)
        neighbour = Fraction(float(np.nextafter(rounded, towards)))
        allowed = {"rm": result <= exact, "rp": result >= exact, "rz": abs(result) <= abs(exact)}
        assert allowed[mode]
        assert result == exact or abs(neighbour - exact) < abs(neighbour - result)


def test_conversion_to_halves() -> None:
    high, low = samples(), samples()
    numbers = ~np.isnan(high) & ~np.isnan(low)
    for name, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        got = execute(f"cvt.rn.{name}.f32 %h0, %a0; cvt.u32.u16 %o, %h0;", bits(high))
        assert (got == half_bits(high, dtype))[numbers].all()
        got = execute(f"cvt.rn.{name}x2.f32 %o, %a0, %a1;", bits(high), bits(low))
        assert (got == (half_bits(high, dtype) << 16 | half_bits(low, dtype)))[numbers].all()
        got = execute(f"cvt.rn.{name}x2.f32 %o, %a0, %a1;", bits(high), bits(np.full(THREADS, np.nan)))
        assert ((got & 0x7FFF) == 0x7FFF).all()
    got = execute("cvt.rz.f16x2.f32 %o, %a0, %a1;", bits(high), bits(low)) & 0xFFFF
    finite = numbers & (np.abs(low) < 65504)
    rounded = got.astype(np.uint16).view(np.float16).astype(np.float64)
    assert (np.abs(rounded[finite]) <= np.abs(low[finite])).all()


@pytest.mark.parametrize(
    ("mode", "rounding"), [("rzi", np.trunc), ("rni", np.rint), ("rmi", np.floor), ("rpi", np.ceil)]
)
def test_conversion_to_integers(mode: str, rounding: Callable[[Array], Array]) -> None:
    x = (DRAW.standard_normal(THREADS) * 1e5).astype(np.float32)
    x[:6] = [np.nan, np.inf, -np.inf, 3e9, -3e9, 0.5]
    got = execute(f"cvt.{mode}.s32.f32 %o, %a0;", bits(x)).view(np.int32)
    exact = rounding(np.nan_to_num(x.astype(np.float64), nan=0))
    assert (got == np.clip(exact, -(2**31), 2**31 - 1).astype(np.int32)).all()
    integers = words(DRAW)
    back = execute("cvt.rn.f32.s32 %o, %a0;", integers).view(np.float32)
    assert (back == integers.view(np.int32).astype(np.float32)).all()


@pytest.mark.parametrize(("kind", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_conversion_to_fp8(kind: str, dtype: torch.dtype) -> None:
    def fp8(values: Array) -> Array:
        return torch.from_numpy(values).to(dtype).view(torch.uint8).numpy().astype(np.uint32)

    high, low = (
        np.clip(DRAW.standard_normal(THREADS) * scale, -448, 448).astype(np.float32) for scale in (20, 0.01)
    )
    body = f"cvt.rn.satfinite.{kind}x2.f32 %h0, %a0, %a1; cvt.u32.u16 %o, %h0;"
    got = execute(body, bits(high), bits(low))
    assert (got == (fp8(high) << 8 | fp8(low))).all()
    back = execute(f"cvt.u16.u32 %h0, %a0; cvt.rn.f16x2.{kind}x2 %o, %h0;", got).view(np.float16)
    assert (back.reshape(-1, 2)[:, 1] == torch.from_numpy(high).to(dtype).float().numpy()).all()


@pytest.mark.parametrize(("name", "dtype"), [("f16x2", torch.float16), ("bf16x2", torch.bfloat16)])
def test_packed_halves(name: str, dtype: torch.dtype) -> None:
    a, b, c = (torch.from_numpy(DRAW.standard_normal(2 * THREADS)).to(dtype) for _ in range(3))

    def compute(body: str, *inputs: torch.Tensor) -> torch.Tensor:
        packed = [value.view(torch.int16).numpy().view(np.uint32) for value in inputs]
        return torch.from_numpy(execute(body, *packed).view(np.int16).copy()).view(dtype)

    assert torch.equal(compute(f"add.rn.{name} %o, %a0, %a1;", a, b), a + b)
    assert torch.equal(compute(f"mul.rn.{name} %o, %a0, %a1;", a, b), a * b)
    assert torch.equal(compute(f"max.{name} %o, %a0, %a1;", a, b), torch.maximum(a, b))
    assert torch.equal(compute(f"neg.{name} %o, %a0;", a), -a)
    fused = (a.double() * b.double() + c.double()).to(dtype)
    # the sum is rounded to float32 first, which changes a rare tie
    assert (compute(f"fma.rn.{name} %o, %a0, %a1, %a2;", a, b, c) == fused).float().mean() > 0.999


FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "ex2.approx.f32": np.exp2,
    "lg2.approx.f32": np.log2,
    "rcp.approx.f32": np.reciprocal,
    "sqrt.rn.f32": np.sqrt,
    "rsqrt.approx.f32": lambda x: 1 / np.sqrt(x),
    "tanh.approx.f32": np.tanh,
    "sin.approx.f32": np.sin,
    "cos.approx.f32": np.cos,
}


@pytest.mark.parametrize("op", FUNCTIONS)
def test_functions(op: str) -> None:
    x = (DRAW.random(THREADS) * 8 + 0.01).astype(np.float32)
    got = execute(f"{op} %o, %a0;", bits(x)).view(np.float32)
    # float32 rounds at 6e-8
    np.testing.assert_allclose(got, FUNCTIONS[op](x.astype(np.float64)), rtol=1e-6, atol=1e-6)
