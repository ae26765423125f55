"""Integer and bit instructions against scalar definitions written from the PTX manual."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.bench.ptx.assembly import ONES, THREADS, execute, integers, signed, words

DRAW = np.random.default_rng(0)
LONG = (1 << 64) - 1


def prmt(a: int, b: int, c: int, mode: str) -> int:
    source = [(a >> 8 * i) & 255 for i in range(4)] + [(b >> 8 * i) & 255 for i in range(4)]
    result, k = 0, c & 3
    for i in range(4):
        if mode == "":
            nibble = c >> 4 * i & 15
            byte = source[nibble & 7]
            byte = (255 if byte & 128 else 0) if nibble & 8 else byte
        else:
            select = {"f4e": (k + i) & 7, "b4e": (k - i) & 7, "rc8": k}
            select |= {"ecl": max(k, i), "ecr": min(k, i), "rc16": 2 * (k & 1) + (i & 1)}
            byte = source[select[mode]]
        result |= byte << 8 * i
    return result


def bfe(a: int, position: int, length: int, is_signed: bool) -> int:
    position, length = position & 255, length & 255
    sign = 0 if not is_signed or length == 0 else a >> min(position + length - 1, 31) & 1
    result = 0
    for i in range(32):
        bit = a >> (position + i) & 1 if i < length and position + i <= 31 else sign
        result |= bit << i
    return result


def bfi(a: int, b: int, position: int, length: int) -> int:
    position, length = position & 255, length & 255
    for i in range(length):
        if position + i > 31:
            break
        b = b & ~(1 << position + i) | (a >> i & 1) << position + i
    return b & ONES


@pytest.mark.parametrize("mode", ["", "f4e", "b4e", "rc8", "ecl", "ecr", "rc16"])
def test_prmt(mode: str) -> None:
    a, b, c = words(DRAW), words(DRAW), words(DRAW)
    got = execute(f"prmt.b32{'.' + mode if mode else ''} %o, %a0, %a1, %a2;", a, b, c)
    want = [prmt(*values, mode) for values in zip(integers(a), integers(b), integers(c), strict=True)]
    assert integers(got) == want


@pytest.mark.parametrize("selector", [0x3210, 0x5410, 0x7632, 0x0123, 0x8888, 0x9BDF, 0x6240, 0x0000])
def test_prmt_with_a_constant_selector(selector: int) -> None:
    a, b = words(DRAW), words(DRAW)
    got = execute(f"prmt.b32 %o, %a0, %a1, {selector};", a, b)
    assert integers(got) == [prmt(x, y, selector, "") for x, y in zip(integers(a), integers(b), strict=True)]


@pytest.mark.parametrize("type_", ["u32", "s32"])
@pytest.mark.parametrize("constant", [None, (3, 5), (0, 32), (30, 5), (8, 0)])
def test_bfe(type_: str, constant: tuple[int, int] | None) -> None:
    a, position, length = words(DRAW), words(DRAW) % 40, words(DRAW) % 40
    if constant:
        got = execute(f"bfe.{type_} %o, %a0, {constant[0]}, {constant[1]};", a)
        position, length = (np.full(THREADS, value) for value in constant)
    else:
        got = execute(f"bfe.{type_} %o, %a0, %a1, %a2;", a, position, length)
    arguments = zip(integers(a), integers(position), integers(length), strict=True)
    assert integers(got) == [bfe(*values, type_ == "s32") for values in arguments]


def test_bfi() -> None:
    inputs = words(DRAW), words(DRAW), words(DRAW) % 40, words(DRAW) % 40
    got = execute("bfi.b32 %o, %a0, %a1, %a2, %a3;", *inputs)
    assert integers(got) == [bfi(*values) for values in zip(*map(integers, inputs), strict=True)]


@pytest.mark.parametrize("table", [0x00, 0xFF, 0xEA, 0x96, 0x1B, 0xCA])
def test_lop3(table: int) -> None:
    inputs = words(DRAW), words(DRAW), words(DRAW)

    def lop3(x: int, y: int, z: int) -> int:
        indices = ((x >> i & 1) << 2 | (y >> i & 1) << 1 | (z >> i & 1) for i in range(32))
        return sum((table >> index & 1) << i for i, index in enumerate(indices))

    got = execute(f"lop3.b32 %o, %a0, %a1, %a2, {table};", *inputs)
    assert integers(got) == [lop3(*values) for values in zip(*map(integers, inputs), strict=True)]


def truncated(a: int, b: int) -> int:
    quotient = abs(signed(a)) // abs(signed(b))
    return quotient if (signed(a) < 0) == (signed(b) < 0) else -quotient


BINARY: dict[str, Callable[[int, int], int]] = {
    "add.s32": lambda a, b: a + b,
    "sub.u32": lambda a, b: a - b,
    "add.sat.s32": lambda a, b: max(-(2**31), min(2**31 - 1, signed(a) + signed(b))),
    "mul.lo.s32": lambda a, b: a * b,
    "mul.hi.u32": lambda a, b: a * b >> 32,
    "mul.hi.s32": lambda a, b: signed(a) * signed(b) >> 32,
    "min.s32": lambda a, b: min(signed(a), signed(b)),
    "max.u32": max,
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b if b < 32 else 0,
    "shr.u32": lambda a, b: a >> b if b < 32 else 0,
    "shr.s32": lambda a, b: signed(a) >> min(b, 31),
    "div.u32": lambda a, b: a // b if b else ONES,
    "rem.u32": lambda a, b: a % b if b else a,
    "div.s32": lambda a, b: truncated(a, b) if b else ONES,
    "rem.s32": lambda a, b: signed(a) - truncated(a, b) * signed(b) if b else a,
    "copysign.f32": lambda a, b: (a & 1 << 31) | (b & ONES >> 1),
}


@pytest.mark.parametrize("op", BINARY)
def test_two_operands(op: str) -> None:
    a, b = words(DRAW), words(DRAW)
    if op[:3] in ("shl", "shr"):
        b[::2] %= 40
    if op[:3] in ("div", "rem"):
        b[::2] %= 1000
        b[(a == 1 << 31) & (b == ONES)] = 3
    got = execute(f"{op} %o, %a0, %a1;", a, b)
    want = [BINARY[op](x, y) & ONES for x, y in zip(integers(a), integers(b), strict=True)]
    assert integers(got) == want


UNARY: dict[str, Callable[[int], int]] = {
    "popc.b32": lambda a: bin(a).count("1"),
    "clz.b32": lambda a: 32 - a.bit_length(),
    "brev.b32": lambda a: int(f"{a:032b}"[::-1], 2),
    "not.b32": lambda a: ~a,
    "cnot.b32": lambda a: int(a == 0),
    "neg.s32": lambda a: -a,
    "abs.s32": lambda a: abs(signed(a)),
    "bfind.u32": lambda a: a.bit_length() - 1,
    "bfind.s32": lambda a: (signed(a) if signed(a) >= 0 else ~signed(a)).bit_length() - 1,
}


@pytest.mark.parametrize("op", UNARY)
def test_one_operand(op: str) -> None:
    a = words(DRAW)
    assert integers(execute(f"{op} %o, %a0;", a)) == [UNARY[op](x) & ONES for x in integers(a)]


SEQUENCES: dict[str, Callable[[int, int, int], int]] = {
    "mad.hi.u32 %o, %a0, %a1, %a2;": lambda a, b, c: (a * b >> 32) + c,
    "mad.hi.s32 %o, %a0, %a1, %a2;": lambda a, b, c: (signed(a) * signed(b) >> 32) + c,
    "mad.lo.s32 %o, %a0, %a1, %a2;": lambda a, b, c: a * b + c,
    "sad.s32 %o, %a0, %a1, %a2;": lambda a, b, c: abs(signed(a) - signed(b)) + c,
    "slct.b32.s32 %o, %a0, %a1, %a2;": lambda a, b, c: a if signed(c) >= 0 else b,
    "cvt.s8.s32 %t0, %a0; mov.b32 %o, %t0;": lambda a, _b, _c: signed(a & 255, 8),
    "cvt.u8.u32 %t0, %a0; mov.b32 %o, %t0;": lambda a, _b, _c: a & 255,
    "cvt.sat.u8.s32 %t0, %a0; mov.b32 %o, %t0;": lambda a, _b, _c: max(0, min(255, signed(a))),
    "cvt.s64.s32 %u0, %a0; shr.u64 %u0, %u0, 32; cvt.u32.u64 %o, %u0;": lambda a, _b, _c: ONES * (a >> 31),
    "mov.b64 %u0, {%a0, %a1}; bfe.u64 %u1, %u0, 20, 30; cvt.u32.u64 %o, %u1;": lambda a, b, _c: (
        (b << 32 | a) >> 20 & (1 << 30) - 1
    ),
    "mov.b32 {%h0, %h1}, %a0; mul.wide.u16 %o, %h0, %h1;": lambda a, _b, _c: (a & 65535) * (a >> 16),
    "mov.b32 {%h0, %h1}, %a0; mov.b32 %o, {%h1, %h0};": lambda a, _b, _c: a >> 16 | a << 16,
    "mov.b32 {%h0, %h1}, %a0; shr.s16 %h0, %h0, 5; mov.b32 %o, {%h0, %h1};": lambda a, _b, _c: (
        (signed(a & 65535, 16) >> 5) & 65535 | a & 0xFFFF0000
    ),
    "dp4a.s32.u32 %o, %a0, %a1, %a2;": lambda a, b, c: (
        c + sum(signed(a >> 8 * i & 255, 8) * (b >> 8 * i & 255) for i in range(4))
    ),
    "shf.l.wrap.b32 %o, %a0, %a1, %a2;": lambda a, b, c: (b << 32 | a) << (c & 31) >> 32,
    "shf.r.clamp.b32 %o, %a0, %a1, %a2;": lambda a, b, c: (b << 32 | a) >> min(c, 32),
}


@pytest.mark.parametrize("body", SEQUENCES)
def test_sequences(body: str) -> None:
    a, b, c = words(DRAW), words(DRAW), words(DRAW)
    got = execute(body, a, b, c)
    arguments = zip(integers(a), integers(b), integers(c), strict=True)
    assert integers(got) == [SEQUENCES[body](*values) & ONES for values in arguments]


CARRIES: dict[str, Callable[[int, int, int], int]] = {
    "mul.wide.s32 %o, %a0, %a1;": lambda a, b, _c: signed(a) * signed(b),
    "mad.lo.cc.u32 %t0, %a0, %a1, %a2; madc.hi.u32 %t1, %a0, %a1, 0; mov.b64 %o, {%t0, %t1};": (
        lambda a, b, c: a * b + c
    ),
    "add.cc.u32 %t0, %a0, %a1; addc.u32 %t1, %a2, 7; mov.b64 %o, {%t0, %t1};": (
        lambda a, b, c: ((c + 7) << 32) + a + b
    ),
    "sub.cc.u32 %t0, %a0, %a1; subc.u32 %t1, %a2, 7; mov.b64 %o, {%t0, %t1};": (
        lambda a, b, c: ((c - 7) << 32) + a - b
    ),
}


@pytest.mark.parametrize("body", CARRIES)
def test_64_bits_in_two_registers(body: str) -> None:
    a, b, c = words(DRAW), words(DRAW), words(DRAW)
    got = execute(body, a, b, c, out_width=8)
    arguments = zip(integers(a), integers(b), integers(c), strict=True)
    assert integers(got) == [CARRIES[body](*values) & LONG for values in arguments]


def test_64_bit_registers() -> None:
    a, b = (DRAW.integers(0, 1 << 64, THREADS, dtype=np.uint64) for _ in range(2))
    cases: dict[str, Callable[[int, int], int]] = {
        "mul.hi.u64": lambda x, y: x * y >> 64,
        "mul.hi.s64": lambda x, y: signed(x, 64) * signed(y, 64) >> 64,
        "mul.lo.s64": lambda x, y: x * y,
        "min.s64": lambda x, y: min(signed(x, 64), signed(y, 64)),
        "div.u64": lambda x, y: x // y,
        "rem.u64": lambda x, y: x % y,
    }
    for op, definition in cases.items():
        want = [definition(x, y) & LONG for x, y in zip(integers(a), integers(b), strict=True)]
        assert integers(execute(f"{op} %o, %a0, %a1;", a, b, out_width=8)) == want, op
    count = b % np.uint64(80)
    got = execute("cvt.u32.u64 %t0, %a1; shr.s64 %o, %a0, %t0;", a, count, out_width=8)
    shifts = zip(integers(a), integers(count), strict=True)
    assert integers(got) == [signed(x, 64) >> min(n, 63) & LONG for x, n in shifts]
