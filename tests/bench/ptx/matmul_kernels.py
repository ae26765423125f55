"""Triton kernels built on tl.dot: tensor cores, shared memory, software pipelines."""

import triton
import triton.language as tl


@triton.jit
def matmul(
    a,
    b,
    c,
    M,
    N,
    K,
    sam,
    sak,
    sbk,
    sbn,
    scm,
    scn,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    MASK: tl.constexpr,
    ACC: tl.constexpr = tl.float32,
):
    pm, pn = tl.program_id(0), tl.program_id(1)
    rm, rn, rk = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros((BM, BN), ACC)
    for k in range(0, K, BK):
        if MASK:
            x = tl.load(
                a + rm[:, None] * sam + (k + rk)[None, :] * sak,
                mask=(rm[:, None] < M) & ((k + rk)[None, :] < K),
                other=0.0,
            )
            y = tl.load(
                b + (k + rk)[:, None] * sbk + rn[None, :] * sbn,
                mask=((k + rk)[:, None] < K) & (rn[None, :] < N),
                other=0.0,
            )
        else:
            x = tl.load(a + rm[:, None] * sam + (k + rk)[None, :] * sak)
            y = tl.load(b + (k + rk)[:, None] * sbk + rn[None, :] * sbn)
        acc = tl.dot(x, y, acc, out_dtype=ACC)
    tl.store(
        c + rm[:, None] * scm + rn[None, :] * scn,
        acc.to(c.dtype.element_ty),
        mask=(rm[:, None] < M) & (rn[None, :] < N),
    )


@triton.jit
def attention(
    q, k, v, o, S, scale, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr
):
    pm, h = tl.program_id(0), tl.program_id(1)
    rm, rn, rd = pm * BM + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, D)
    base = h * S * D
    qq = tl.load(q + base + rm[:, None] * D + rd[None, :], mask=rm[:, None] < S, other=0.0)
    m = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    end = tl.minimum(S, (pm + 1) * BM) if CAUSAL else S
    for n in range(0, end, BN):
        kk = tl.load(k + base + (n + rn)[None, :] * D + rd[:, None], mask=(n + rn)[None, :] < S, other=0.0)
        vv = tl.load(v + base + (n + rn)[:, None] * D + rd[None, :], mask=(n + rn)[:, None] < S, other=0.0)
        s = tl.dot(qq, kk) * scale * 1.44269504
        ok = (n + rn)[None, :] < S
        if CAUSAL:
            ok = ok & (rm[:, None] >= (n + rn)[None, :])
        s = tl.where(ok, s, -float("inf"))
        mn = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - mn[:, None])
        r = tl.exp2(m - mn)
        total = total * r + tl.sum(p, 1)
        acc = tl.dot(p.to(vv.dtype), vv, acc * r[:, None])
        m = mn
    tl.store(
        o + base + rm[:, None] * D + rd[None, :],
        (acc / total[:, None]).to(o.dtype.element_ty),
        mask=rm[:, None] < S,
    )


@triton.jit
def ragged_matmul(a, b, c, lens, KMAX, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """One small product per program, each with its own inner length: the pipelined loop runs under masks."""
    p = tl.program_id(0)
    K = tl.load(lens + p)
    rm, rn, rk = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        x = tl.load(
            a + (p * BM + rm)[:, None] * KMAX + (k + rk)[None, :], mask=(k + rk)[None, :] < K, other=0.0
        )
        y = tl.load(
            b + (p * KMAX + k + rk)[:, None] * BN + rn[None, :], mask=(k + rk)[:, None] < K, other=0.0
        )
        acc = tl.dot(x, y, acc)
    tl.store(c + (p * BM + rm)[:, None] * BN + rn[None, :], acc)
