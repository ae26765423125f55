"""NF4 on a GPU: the decode that every kernel shares, and the dequantisation of a whole weight.

    W[n, k] = code[q[n, k]] * absmax[(n K + k) // blocksize]        one float32 product, one cast

bitsandbytes packs two consecutive weights into a byte, the even one in the high nibble. The kernels read
the packed weight as little-endian 32-bit words of eight weights. A table of the 16 codes lies in the lanes
of each warp, twice over, and a `shfl` looks a weight up by the low five bits of its shifted word: no mask,
no memory access, and the same float32 product as bitsandbytes, bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .nf4 import NF4Weight
from .specimens import Specimen

# eight look-ups and eight float32 products; what becomes of them follows
_PRODUCTS = """
.reg .b32 n0, n1, n2, n3, n4, n5, n6;
.reg .f32 c0, c1, c2, c3, c4, c5, c6, c7;
shr.u32 n0, {word}, 4;
shr.u32 n1, {word}, 12;
shr.u32 n2, {word}, 8;
shr.u32 n3, {word}, 20;
shr.u32 n4, {word}, 16;
shr.u32 n5, {word}, 28;
shr.u32 n6, {word}, 24;
shfl.sync.idx.b32 c0, {table}, n0, 31, -1;
shfl.sync.idx.b32 c1, {table}, {word}, 31, -1;
shfl.sync.idx.b32 c2, {table}, n1, 31, -1;
shfl.sync.idx.b32 c3, {table}, n2, 31, -1;
shfl.sync.idx.b32 c4, {table}, n3, 31, -1;
shfl.sync.idx.b32 c5, {table}, n4, 31, -1;
shfl.sync.idx.b32 c6, {table}, n5, 31, -1;
shfl.sync.idx.b32 c7, {table}, n6, 31, -1;
mul.rn.f32 c0, c0, {absmax};
mul.rn.f32 c1, c1, {absmax};
mul.rn.f32 c2, c2, {absmax};
mul.rn.f32 c3, c3, {absmax};
mul.rn.f32 c4, c4, {absmax};
mul.rn.f32 c5, c5, {absmax};
mul.rn.f32 c6, c6, {absmax};
mul.rn.f32 c7, c7, {absmax};
"""
_PAIRS = """
cvt.rn.{pair}.f32 $0, c1, c0;
cvt.rn.{pair}.f32 $1, c3, c2;
cvt.rn.{pair}.f32 $2, c5, c4;
cvt.rn.{pair}.f32 $3, c7, c6;
"""


def _decode_pairs(pair: str) -> str:
    return "{" + _PRODUCTS.format(word="$4", table="$5", absmax="$6") + _PAIRS.format(pair=pair) + "}"


def _decode_singles() -> str:
    moves = "".join(f"mov.f32 ${index}, c{index};\n" for index in range(8))
    return "{" + _PRODUCTS.format(word="$8", table="$9", absmax="$10") + moves + "}"


DECODE_BF16 = tl.constexpr(_decode_pairs("bf16x2"))
DECODE_FP16 = tl.constexpr(_decode_pairs("f16x2"))
DECODE_FP32 = tl.constexpr(_decode_singles())
LANE = tl.constexpr("{ .reg .b32 lane; mov.u32 lane, %laneid; and.b32 $0, lane, 15; }")


@triton.jit
def lane_table(code_ptr, ROWS: tl.constexpr, WORDS: tl.constexpr, INTERPRET: tl.constexpr):
    """The codes as the decode wants them: code[lane mod 16] in every lane, shaped like the words."""
    zeros = tl.zeros((ROWS, WORDS), tl.int32)
    if INTERPRET:
        table = zeros.to(tl.float32)  # the decode loads from memory instead
    else:
        lane = tl.inline_asm_elementwise(LANE, "=r,r", [zeros], dtype=tl.int32, is_pure=True, pack=1)
        table = tl.load(code_ptr + lane)
    return table


@triton.jit
def _from_memory(words, absmax, code_ptr, ROWS: tl.constexpr, WORDS: tl.constexpr, DTYPE: tl.constexpr):
    """The decode without assembly, for Triton's interpreter."""
    place = tl.arange(0, 8)
    shift = (place // 2) * 8 + 4 - (place % 2) * 4
    nibble = (words[:, :, None] >> shift[None, None, :]) & 15
    weight = tl.load(code_ptr + nibble) * tl.broadcast_to(absmax, (ROWS, WORDS))[:, :, None]
    return tl.reshape(weight.to(DTYPE), (ROWS, WORDS * 8))


@triton.jit
def _to_float32(words, absmax, table, ROWS: tl.constexpr, WORDS: tl.constexpr):
    a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
        DECODE_FP32, "=f,=f,=f,=f,=f,=f,=f,=f,r,r,r", [words, table, absmax],
        dtype=(tl.float32,) * 8, is_pure=True, pack=1,
    )  # fmt: skip
    even = tl.join(tl.join(a, e), tl.join(c, g))
    odd = tl.join(tl.join(b, f), tl.join(d, h))
    return tl.reshape(tl.join(even, odd), (ROWS, WORDS * 8))


@triton.jit
def _to_16_bits(words, absmax, table, ROWS: tl.constexpr, WORDS: tl.constexpr, DTYPE: tl.constexpr):
    a, b, c, d = tl.inline_asm_elementwise(
        DECODE_BF16 if DTYPE == tl.bfloat16 else DECODE_FP16,  # noqa: SIM300
        "=r,=r,=r,=r,r,r,r", [words, table, absmax], dtype=(tl.int32,) * 4, is_pure=True, pack=1,
    )  # fmt: skip
    pairs = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (ROWS, WORDS * 4))
    low = (pairs & 0xFFFF).to(tl.uint16)
    high = (pairs.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16)
    return tl.reshape(tl.join(low, high), (ROWS, WORDS * 8)).to(DTYPE, bitcast=True)


@triton.jit
def decode(
    words, absmax, table, code_ptr, ROWS: tl.constexpr, WORDS: tl.constexpr, DTYPE: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """words [ROWS, WORDS] of eight weights, absmax broadcastable to them -> [ROWS, 8 WORDS] in DTYPE."""
    if INTERPRET:
        weight = _from_memory(words, absmax, code_ptr, ROWS, WORDS, DTYPE)
    elif DTYPE == tl.float32:  # noqa: SIM300
        weight = _to_float32(words, absmax, table, ROWS, WORDS)
    else:
        weight = _to_16_bits(words, absmax, table, ROWS, WORDS, DTYPE)
    return weight


@triton.jit
def pin(weight, INTERPRET: tl.constexpr):
    """Keep the decode where it is: without this the compiler repeats it in every warp that multiplies."""
    if not INTERPRET:
        weight = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [weight], dtype=weight.dtype, is_pure=False, pack=2
        )
    return weight


@triton.jit
def load_absmax(
    absmax_ptr, absmax_code_ptr, absmax_scale_ptr, absmax_offset, block, NESTED: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
):  # fmt: skip
    """The absmax of blocks; nested: code[q] * scale + offset, rounded after each (no fused multiply-add)."""
    if NESTED:
        index = tl.load(absmax_ptr + block).to(tl.int32)
        scale = tl.load(absmax_scale_ptr + block // NESTED_BLOCK)
        absmax = tl.load(absmax_code_ptr + index) * scale + absmax_offset
    else:
        absmax = tl.load(absmax_ptr + block)
    return absmax


@triton.jit(do_not_specialize=["groups"])
def _dequantize_kernel(
    packed_ptr, absmax_ptr, code_ptr, absmax_code_ptr, absmax_scale_ptr, absmax_offset_ptr, out_ptr,
    groups, BLOCK_WORDS: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr,
    WORDS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """out[8 w .. 8 w + 7] from packed word w; a row of the tile is a quantisation block, or a part of one."""
    ROWS: tl.constexpr = WORDS // 8
    words = groups.to(tl.int64) * 8
    first = tl.program_id(0).to(tl.int64) * WORDS
    row, column = tl.arange(0, ROWS), tl.arange(0, 8)
    word = row[:, None] * 8 + column[None, :]
    packed = tl.load(packed_ptr + first + word, mask=first + word < words, other=0)
    block = (first + row * 8) // BLOCK_WORDS
    block = tl.minimum(block, (words - 1) // BLOCK_WORDS)
    offset = tl.load(absmax_offset_ptr) if NESTED else 0.0
    absmax = load_absmax(absmax_ptr, absmax_code_ptr, absmax_scale_ptr, offset, block, NESTED, NESTED_BLOCK)
    table = lane_table(code_ptr, ROWS, 8, INTERPRET)
    weight = decode(packed, absmax[:, None], table, code_ptr, ROWS, 8, out_ptr.dtype.element_ty, INTERPRET)
    element = row[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(out_ptr + first * 8 + element, weight, mask=first * 8 + element < words * 8)


DEQUANTIZE_WORDS = 1024  # a program's packed words: 4 KiB read, 16 KiB written
DEQUANTIZE_WARPS = 8


def nf4_arguments(weight: NF4Weight) -> tuple[dict[str, Tensor], dict[str, int | bool]]:
    """A weight as the kernels' pointers and constants."""
    code, nested = weight.code, weight.nested
    packed = weight.packed.view(-1)
    if packed.data_ptr() % 16:
        packed = packed.clone()  # a view into somebody's buffer; the kernels read 16 bytes at once
    pointers = {
        "packed_ptr": packed.view(torch.int32),
        "absmax_ptr": weight.absmax,
        "code_ptr": code,
        "absmax_code_ptr": code if weight.absmax_code is None else weight.absmax_code,
        "absmax_scale_ptr": code if weight.absmax_scale is None else weight.absmax_scale,
        "absmax_offset_ptr": code if weight.absmax_offset is None else weight.absmax_offset,
    }
    return pointers, {"NESTED": nested, "NESTED_BLOCK": weight.absmax_blocksize if nested else 1}


def obstacle(weight: NF4Weight) -> str | None:
    """Why the kernels can't read this weight, or None."""
    n, k = weight.shape
    if n * k % 64:
        return f"its {n} x {k} weights are not a multiple of 64"
    if weight.blocksize < 64:
        return f"its blocksize is {weight.blocksize}, the kernels take 64 and larger"
    return None


def dequantize(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    """[N, K] in `dtype` (bf16, fp16 or fp32), one launch, nested absmax included, 16-byte stores."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.packed.device)
    groups = out.numel() // 64
    pointers, constants = nf4_arguments(weight)
    grid = (triton.cdiv(groups * 8, DEQUANTIZE_WORDS),)
    _dequantize_kernel[grid](
        **pointers,
        out_ptr=out,
        groups=groups,
        BLOCK_WORDS=weight.blocksize // 8,
        **constants,
        WORDS=DEQUANTIZE_WORDS,
        INTERPRET=triton.knobs.runtime.interpret,
        num_warps=DEQUANTIZE_WARPS,
        enable_fp_fusion=False,
    )
    return out


NF4_SIGNATURE = {
    "packed_ptr": "*i32",
    "absmax_ptr": "*u8",
    "code_ptr": "*fp32",
    "absmax_code_ptr": "*fp32",
    "absmax_scale_ptr": "*fp32",
    "absmax_offset_ptr": "*fp32",
}


def specimens() -> list[Specimen]:
    """Of `dequantize`, by dtype and nesting."""
    found = []
    for dtype in ("bf16", "fp16", "fp32"):
        for nested in (True, False):
            signature = NF4_SIGNATURE | {"out_ptr": f"*{dtype}", "groups": "i32"}
            if not nested:
                signature["absmax_ptr"] = "*fp32"
            found.append(
                Specimen(
                    name=f"nf4_dequantize {dtype}{' nested' if nested else ''}",
                    kernel=_dequantize_kernel,
                    signature=signature,
                    constexprs={
                        "BLOCK_WORDS": 8,
                        "NESTED": nested,
                        "NESTED_BLOCK": 256 if nested else 1,
                        "WORDS": DEQUANTIZE_WORDS,
                        "INTERPRET": False,
                    },
                    aligned=frozenset(name for name in signature if name.endswith("_ptr")),
                    num_warps=DEQUANTIZE_WARPS,
                    num_stages=3,
                    budget="light",
                    hot=("packed_ptr", "out_ptr"),
                    options={"enable_fp_fusion": False},
                )
            )
    return found
