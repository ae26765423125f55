"""Triton kernels of all kinds, for the emulator to run."""

import triton
import triton.language as tl


@triton.jit
def vadd(x, y, z, n, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    m = o < n
    tl.store(z + o, tl.load(x + o, mask=m) + tl.load(y + o, mask=m), mask=m)


@triton.jit
def vadd_unmasked(x, y, z, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(z + o, tl.load(x + o) + tl.load(y + o))


@triton.jit
def softmax(x, y, n, sx, sy, B: tl.constexpr):
    r = tl.program_id(0)
    o = tl.arange(0, B)
    v = tl.load(x + r * sx + o, mask=o < n, other=-float("inf")).to(tl.float32)
    e = tl.exp(v - tl.max(v, 0))
    tl.store(y + r * sy + o, (e / tl.sum(e, 0)).to(y.dtype.element_ty), mask=o < n)


@triton.jit
def layernorm(x, w, b, y, n, eps, B: tl.constexpr):
    """Looping over the row, so a runtime trip count."""
    r = tl.program_id(0)
    o = tl.arange(0, B)
    s = tl.zeros((B,), tl.float32)
    for i in range(0, n, B):
        s += tl.load(x + r * n + i + o, mask=i + o < n, other=0.0).to(tl.float32)
    mean = tl.sum(s, 0) / n
    q = tl.zeros((B,), tl.float32)
    for i in range(0, n, B):
        v = tl.load(x + r * n + i + o, mask=i + o < n, other=0.0).to(tl.float32)
        v = tl.where(i + o < n, v - mean, 0.0)
        q += v * v
    rstd = tl.rsqrt(tl.sum(q, 0) / n + eps)
    for i in range(0, n, B):
        m = i + o < n
        v = tl.load(x + r * n + i + o, mask=m, other=0.0).to(tl.float32)
        v = (v - mean) * rstd * tl.load(w + i + o, mask=m, other=0.0) + tl.load(b + i + o, mask=m, other=0.0)
        tl.store(y + r * n + i + o, v.to(y.dtype.element_ty), mask=m)


@triton.jit
def atomics(x, idx, out, mx, cnt, n, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    m = o < n
    v = tl.load(x + o, mask=m, other=0.0)
    i = tl.load(idx + o, mask=m, other=0)
    tl.atomic_add(out + i, v, mask=m)
    tl.atomic_max(mx + i, v, mask=m)
    tl.atomic_add(cnt, 1)


@triton.jit
def ticket(cnt, out, B: tl.constexpr):
    """The value an atomic returns is used: each program takes a number."""
    t = tl.atomic_add(cnt, 1)
    tl.store(out + t * B + tl.arange(0, B), tl.program_id(0))


@triton.jit
def spinlock(lock, acc, B: tl.constexpr):
    """Programs take turns at a lock, as in the layer-norm tutorial."""
    o = tl.arange(0, B)
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    v = tl.load(acc + o)
    tl.store(acc + o, v + tl.program_id(0) + 1)
    tl.debug_barrier()
    tl.atomic_xchg(lock, 0)


@triton.jit
def sort_scan(x, srt, cum, gat, arg, hist, B: tl.constexpr):
    o = tl.arange(0, B)
    v = tl.load(x + o)
    tl.store(srt + o, tl.sort(v))
    tl.store(cum + o, tl.cumsum(v, 0))
    tl.store(gat + o, tl.gather(v, (o * 7 + 3) % B, 0))
    tl.store(arg, tl.argmax(v, 0))
    tl.store(hist + tl.arange(0, 16), tl.histogram((v * 16).to(tl.int32), 16))


@triton.jit
def dropout(x, y, seed, p, n, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    v = tl.load(x + o, mask=o < n)
    keep = tl.rand(seed, o) > p
    tl.store(y + o, tl.where(keep, v / (1 - p), 0.0), mask=o < n)


@triton.jit
def normals(y, seed, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(y + o, tl.randn(seed, o))


@triton.jit
def elementwise(x, y, n, OP: tl.constexpr, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    v = tl.load(x + o, mask=o < n, other=1.0)
    if OP == "sin":
        r = tl.sin(v)
    elif OP == "cos":
        r = tl.cos(v)
    elif OP == "exp":
        r = tl.exp(v)
    elif OP == "log":
        r = tl.log(tl.abs(v) + 1e-3)
    elif OP == "erf":
        r = tl.erf(v)
    elif OP == "sqrt":
        r = tl.sqrt(tl.abs(v)) + tl.sqrt_rn(tl.abs(v)) + tl.rsqrt(tl.abs(v) + 1)
    elif OP == "div":
        r = v / (v * v + 1) + tl.div_rn(v, v * v + 2)
    elif OP == "floor":
        r = tl.floor(v) + tl.ceil(v * 2)
    elif OP == "sigmoid":
        r = tl.sigmoid(v)
    elif OP == "minmax":
        r = tl.minimum(v, 0.5) + tl.maximum(v, -0.25) + tl.clamp(v, -1.0, 1.0)
    tl.store(y + o, r, mask=o < n)


@triton.jit
def convert(x, y, n, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + o, tl.load(x + o, mask=o < n, other=0.0).to(y.dtype.element_ty), mask=o < n)


@triton.jit
def integer_operations(x, y, out, n, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    m = o < n
    a = tl.load(x + o, mask=m, other=1)
    b = tl.load(y + o, mask=m, other=1)
    tl.store(out + o, a // b, mask=m)
    tl.store(out + n + o, a % b, mask=m)
    tl.store(out + 2 * n + o, a * b + (a >> 3) - (b << 2), mask=m)
    tl.store(out + 3 * n + o, (a & b) ^ (a | ~b), mask=m)
    tl.store(out + 4 * n + o, tl.minimum(a, b) + tl.maximum(a, b) * tl.abs(a), mask=m)


@triton.jit
def bytes_reversed(x, y, B: tl.constexpr):
    o = tl.arange(0, B)
    v = tl.load(x + o)
    r = tl.inline_asm_elementwise(
        "{ .reg .b32 t; prmt.b32 t, $1, 0, 0x0123; mov.b32 $0, t; }",
        "=r,r",
        [v],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )
    tl.store(y + o, r)


@triton.jit
def nibble_table(x, y, B: tl.constexpr):
    """A 16-byte table looked up by prmt with a variable selector, four packed bytes at a time."""
    o = tl.arange(0, B)
    v = tl.load(x + o)
    r = tl.inline_asm_elementwise(
        """{
        .reg .b32 s, a, b, m;
        prmt.b32 s, $1, 0, 0x4420;
        and.b32 s, $1, 0x0f0f0f0f;
        shr.b32 m, s, 4;
        or.b32 s, s, m;
        prmt.b32 s, s, 0, 0x4420;
        and.b32 m, s, 0x7777;
        prmt.b32 a, 0x13121110, 0x17161514, m;
        prmt.b32 b, 0x23222120, 0x27262524, m;
        and.b32 m, s, 0x8888;
        shr.b32 m, m, 1;
        or.b32 m, m, 0x3210;
        prmt.b32 $0, a, b, m;
        }""",
        "=r,r",
        [v],
        dtype=tl.uint8,
        is_pure=True,
        pack=4,
    )
    tl.store(y + o, r)


@triton.jit
def ragged(lens, x, y, S, B: tl.constexpr):
    """Each program loops its own number of times (CTAs of a batch diverge)."""
    r = tl.program_id(0)
    n = tl.load(lens + r)
    o = tl.arange(0, B)
    acc = tl.zeros((B,), tl.float32)
    for i in range(0, n):
        acc += tl.load(x + (r * S + i) * B + o)
    if n % 2 == 1:
        acc = -acc
    tl.store(y + r * B + o, tl.sum(acc, 0) + acc)


@triton.jit
def policies(x, y, z, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    v = tl.load(x + o, eviction_policy="evict_last") + tl.load(y + o, eviction_policy="evict_first")
    tl.store(z + o, v, eviction_policy="evict_first")


@triton.jit(noinline=True)
def helper(a, b):
    r = a * b
    if r > 50:
        r = r - 2 * b
    return r + 1


@triton.jit
def calls(x, y, B: tl.constexpr):
    """Device functions that are not inlined."""
    o, p = tl.arange(0, B), tl.program_id(0)
    s = helper(p, 3)
    for i in range(0, 3):
        s = helper(p + i, s)
    tl.store(y + p * B + o, tl.load(x + o) + s)


@triton.jit
def atomic_half(x, out, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.atomic_add(out + o % 4, tl.load(x + o))


@triton.jit
def asserting(x, B: tl.constexpr):
    v = tl.load(x + tl.arange(0, B))
    tl.device_assert(v >= 0, "negative")
    tl.store(x + tl.arange(0, B), v + 1)


@triton.jit
def column(x, y, S, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(y + o, tl.load(x + o * S))


@triton.jit
def far(x, y, a, b, B: tl.constexpr):
    """Offsets far past 2^31 elements, in 64 bits; a - b is 1."""
    o = tl.arange(0, B).to(tl.int64)
    tl.store(y + o, tl.load(x + (B - 1) - o * a + o * b))


@triton.jit
def lane_table(codes, y, B: tl.constexpr):
    """A 16-entry table held in the lanes of each warp and read by shfl with a register as index."""
    o = tl.arange(0, B)
    r = tl.inline_asm_elementwise(
        """{
        .reg .b32 lane, entry, index;
        .reg .f32 value;
        mov.u32 lane, %laneid;
        and.b32 lane, lane, 15;
        cvt.rn.f32.u32 value, lane;
        mul.f32 value, value, 0f3F000000;
        mov.b32 entry, value;
        and.b32 index, $1, 15;
        shfl.sync.idx.b32 $0, entry, index, 0x1f, 0xffffffff;
        }""",
        "=r,r",
        [tl.load(codes + o)],
        dtype=tl.float32,
        is_pure=False,
        pack=1,
    )
    tl.store(y + o, r)


@triton.jit
def two_halves(x, y, KIND: tl.constexpr, B: tl.constexpr):
    """Two floats packed into one register of bf16 or fp16."""
    o = tl.arange(0, B)
    a, b = tl.load(x + 2 * o), tl.load(x + 2 * o + 1)
    if KIND == "bf16":
        r = tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [a, b], tl.int32, True, 1)
    else:
        r = tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [a, b], tl.int32, True, 1)
    tl.store(y + o, r)


@triton.jit
def philox_words(y, seed, B: tl.constexpr):
    o = tl.arange(0, B)
    a, b, c, d = tl.philox(seed, o.to(tl.uint32), 7, 0, 0)
    tl.store(y + o * 4, a.to(tl.int32, bitcast=True))
    tl.store(y + o * 4 + 1, b.to(tl.int32, bitcast=True))
    tl.store(y + o * 4 + 2, c.to(tl.int32, bitcast=True))
    tl.store(y + o * 4 + 3, d.to(tl.int32, bitcast=True))


@triton.autotune([triton.Config({"B": 128}, num_warps=2), triton.Config({"B": 256}, num_warps=8)], key=["n"])
@triton.jit
def tuned_scale(x, y, s, n, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + o, tl.load(x + o, mask=o < n) * s, mask=o < n)


@triton.jit
def multiply_add(x, y, z, B: tl.constexpr):
    o = tl.arange(0, B)
    v = tl.load(x + o)
    tl.store(z + o, v * v + tl.load(y + o))
