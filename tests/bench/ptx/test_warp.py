"""Instructions of whole warps, control flow, and what the parser has to understand."""

from __future__ import annotations

import numpy as np
import pytest

from qtrain.bench.ptx import run
from qtrain.bench.ptx.matrix import mma
from tests.bench.ptx.assembly import HEADER, ONES, THREADS, Array, execute, words

DRAW = np.random.default_rng(2)


def shuffled(values: list[int], mode: str, b: int, c: int) -> list[int]:
    """shfl.sync of one warp by the PTX manual."""
    result = []
    for lane in range(32):
        index, clamp, segment = b & 31, c & 31, c >> 8 & 31
        low, high = lane & segment, lane & segment | clamp & ~segment & 31
        source = {
            "up": lane - index,
            "down": lane + index,
            "bfly": lane ^ index,
            "idx": low | index & ~segment,
        }
        inside = source[mode] >= high if mode == "up" else source[mode] <= high
        result.append(values[source[mode]] if inside else values[lane])
    return result


@pytest.mark.parametrize(
    ("mode", "b", "c"),
    [
        *(("bfly", 1, 31), ("bfly", 16, 31), ("idx", 5, 31), ("up", 1, 0), ("up", 3, 0x1800)),
        *(("down", 2, 31), ("down", 1, 0x181F), ("idx", 3, 0x1C1F), ("idx", 6, 0x100F)),
    ],
)
@pytest.mark.parametrize("by_register", [False, True])
def test_shuffle(mode: str, b: int, c: int, by_register: bool) -> None:
    a = words(DRAW)
    lane = "%t0" if by_register else str(b)
    got = execute(f"mov.b32 %t0, {b}; shfl.sync.{mode}.b32 %o, %a0, {lane}, {c}, -1;", a)
    assert (got.reshape(-1, 32) == [shuffled(list(warp), mode, b, c) for warp in a.reshape(-1, 32)]).all()


def test_shuffle_with_an_index_of_its_own_in_each_lane() -> None:
    a, index = words(DRAW), words(DRAW)
    got = execute("shfl.sync.idx.b32 %o|%q0, %a0, %a1, 31, -1; @!%q0 mov.b32 %o, 0;", a, index)
    want = np.take_along_axis(a.reshape(-1, 32), (index & 31).astype(np.int64).reshape(-1, 32), 1)
    assert (got == want.ravel()).all()


def test_lane_and_warp_numbers() -> None:
    got = execute("mov.u32 %t0, %laneid; mov.u32 %t1, %warpid; mad.lo.u32 %o, %t1, 32, %t0;", words(DRAW))
    assert (got == np.arange(THREADS)).all()


def test_votes() -> None:
    a = DRAW.integers(0, 4, THREADS).astype(np.uint32)
    warps = a.reshape(-1, 32)
    got = execute("setp.eq.u32 %q0, %a0, 1; vote.sync.ballot.b32 %o, %q0, -1;", a).reshape(-1, 32)
    assert (got[:, 0] == [sum(1 << i for i in range(32) if warp[i] == 1) for warp in warps]).all()
    got = execute("match.any.sync.b32 %o, %a0, -1;", a).reshape(-1, 32)
    equal = warps[:, :, None] == warps[:, None, :]
    assert (got == (equal * (1 << np.arange(32))).sum(2)).all()
    got = execute("redux.sync.add.u32 %o, %a0, -1;", a).reshape(-1, 32)
    assert (got == warps.sum(1, keepdims=True)).all()


def test_divergence() -> None:
    """A loop whose trip count differs by lane, an if / else, then a shuffle of the reunited warp."""
    body = """mov.b32 %o, 0; mov.b32 %t0, 0;
    $L1: setp.ge.u32 %q0, %t0, %a0; @%q0 bra $L2;
    add.u32 %o, %o, %t0; add.u32 %t0, %t0, 1; bra.uni $L1;
    $L2: and.b32 %t1, %a0, 1; setp.eq.u32 %q1, %t1, 0; @%q1 bra $L3;
    add.u32 %o, %o, 1000; bra.uni $L4;
    $L3: add.u32 %o, %o, 2000;
    $L4: shfl.sync.idx.b32 %t2, %o, 0, 31, -1; add.u32 %o, %o, %t2;"""
    a = DRAW.integers(0, 20, THREADS).astype(np.uint32)
    each = a * (a - (a > 0)) // 2 + np.where(a & 1, 1000, 2000)
    assert (execute(body, a) == each + np.repeat(each.reshape(-1, 32)[:, 0], 32)).all()


def test_loads_extend_by_their_sign() -> None:
    """A load narrower than its register, from parameters as well."""
    ptx = f"""{HEADER}.visible .entry k(.param .u32 k_0, .param .u64 k_1)
    {{
    .reg .b64 %d<4>; .reg .b16 %h<2>; .reg .b32 %r<4>;
    ld.param.s32 %d0, [k_0]; ld.param.u64 %d1, [k_1]; st.global.b64 [%d1], %d0;
    ld.param.u32 %d0, [k_0]; st.global.b64 [%d1+8], %d0;
    ld.param.s8 %h0, [k_0]; cvt.s32.s16 %r0, %h0; st.global.b32 [%d1+16], %r0;
    ld.param.u8 %h0, [k_0]; cvt.u32.u16 %r0, %h0; st.global.b32 [%d1+20], %r0;
    ld.global.s16 %r1, [%d1+16]; st.global.b32 [%d1+24], %r1;
    ld.global.u16 %r1, [%d1+16]; st.global.b32 [%d1+28], %r1; ret;
    }}"""
    y = np.zeros(4, np.int64)
    run(ptx, 1, [-100, y], num_warps=1)
    assert list(y[:2]) == [-100, 2**32 - 100]
    assert list(y[2:].view(np.int32)) == [-100, 156, -100, 65436]


def test_an_unknown_instruction_is_named() -> None:
    with pytest.raises(NotImplementedError, match=r"unknown instruction at PTX line \d+: `frobnicate"):
        execute("frobnicate.b32 %o, %a0;", words(DRAW))


def test_text_without_an_entry_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no \.entry"):
        run(HEADER, 1, [])


SHAPE = {"bf16": 16, "f16": 16, "tf32": 8, "s8": 32}  # k of m16n8


def register(values: list[int], kind: str) -> int:
    """Elements of one fragment register, packed."""
    if kind == "s8":
        return sum((value & 255) << 8 * i for i, value in enumerate(values))
    if kind == "tf32":
        return int(np.float32(values[0]).view(np.uint32))
    if kind == "f16":
        low, high = (int(np.float16(value).view(np.uint16)) for value in values)
    else:
        low, high = (int(np.float32(value).view(np.uint32)) >> 16 for value in values)
    return low | high << 16


@pytest.mark.parametrize("kind", SHAPE)
def test_mma_fragments(kind: str) -> None:
    """One mma, with fragments built by the formulas of the PTX manual."""
    k = SHAPE[kind]
    a, b, c = DRAW.integers(-8, 8, (16, k)), DRAW.integers(-8, 8, (k, 8)), DRAW.integers(-8, 8, (16, 8))
    each = {"bf16": 2, "f16": 2, "tf32": 1, "s8": 4}[kind]
    accumulator = np.int32 if kind == "s8" else np.float32
    fragments = np.zeros((10, 32), np.uint32)
    want = np.zeros((4, 32))
    for lane in range(32):
        group, place = lane >> 2, lane & 3
        for i in range(4):
            column = place * each + (k // 2) * (i >> 1)
            elements = [int(a[group + 8 * (i & 1), column + e]) for e in range(each)]
            fragments[i, lane] = register(elements, kind)
        for i in range(2):
            row = place * each + (k // 2) * i
            fragments[4 + i, lane] = register([int(b[row + e, group]) for e in range(each)], kind)
        for i in range(4):
            at = group + 8 * (i >> 1), 2 * place + (i & 1)
            fragments[6 + i, lane] = np.array(c[at], accumulator).view(np.uint32)
            want[i, lane] = (a @ b + c)[at]
    types = "s32.s8.s8.s32" if kind == "s8" else f"f32.{kind}.{kind}.f32"
    body = (
        f"mma.sync.aligned.m16n8k{k}.row.col.{types} "
        "{%t0,%t1,%t2,%t3}, {%a0,%a1,%a2,%a3}, {%a4,%a5}, {%a6,%a7,%a8,%a9};"
    )
    for i in range(4):
        got = execute(f"{body} mov.b32 %o, %t{i};", *(np.tile(row, THREADS // 32) for row in fragments))
        assert (got[:32].view(accumulator) == want[i]).all()


@pytest.mark.parametrize("choice", ["all", "transposed", "few"])
def test_groups_of_mma(choice: str) -> None:
    """A group is computed in one matmul: with all pairs of (A, B), with them permuted, with few of them."""
    pairs = {
        "all": [(i, j) for i in range(6) for j in range(6)],
        "transposed": [(j, i) for i in range(6) for j in range(6)],
        "few": [(i, 5 - i) for i in range(6)],
    }[choice]

    def fragments(registers: int) -> list[tuple[Array, ...]]:
        drawn = DRAW.integers(0, ONES, (6, registers, 64), dtype=np.uint32) & np.uint32(0x3FFF3FFF)
        return [tuple(fragment) for fragment in drawn]

    a, b = fragments(4), fragments(2)
    c = [tuple(DRAW.standard_normal((4, 64)).astype(np.float32)) for _ in pairs]
    got = mma(("bf16", "f4"), a, b, c, pairs)
    for n, (i, j) in enumerate(pairs):
        alone = mma(("bf16", "f4"), [a[i]], [b[j]], [c[n]], [(0, 0)])
        # BLAS may add in another order
        np.testing.assert_allclose(got[4 * n : 4 * n + 4], alone, rtol=1e-6)
