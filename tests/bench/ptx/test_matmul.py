"""tl.dot in all types: pipelines, masks, transposed operands, accumulators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton.language as tl

from qtrain.bench.ptx import Counters, launch
from tests.bench.ptx import matmul_kernels as kernels

# the product of two 16-bit floats is exact in fp32: what is left is the order of a sum of up to 256 terms
EXACT_PRODUCTS = 2e-3
# tf32 keeps 10 bits of each factor
TF32 = 0.3
TOLERANCE = {torch.bfloat16: EXACT_PRODUCTS, torch.float16: EXACT_PRODUCTS, torch.float32: TF32}


def multiply(
    dtype: torch.dtype,
    out: torch.dtype,
    shape: tuple[int, int, int],
    tile: tuple[int, int, int],
    transposed: tuple[bool, bool] = (False, False),
    acc: Any = tl.float32,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor, Counters]:
    """(result of the kernel, result in float64, counters)."""
    m, n, k = shape
    if dtype == torch.int8:
        a, b = torch.randint(-128, 128, (m, k), dtype=dtype), torch.randint(-128, 128, (k, n), dtype=dtype)
    else:
        a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    a, b = (x.t().contiguous().t() if flip else x for x, flip in zip((a, b), transposed, strict=True))
    c = torch.full((m, n), -1).to(out)
    grid = (-(-m // tile[0]), -(-n // tile[1]))
    blocks = dict(zip(("BM", "BN", "BK"), tile, strict=True))
    whole = all(size % block == 0 for size, block in zip(shape, tile, strict=True))
    strides = (*a.stride(), *b.stride(), *c.stride())
    counters = launch(
        kernels.matmul, grid, a, b, c, m, n, k, *strides, **blocks, MASK=not whole, ACC=acc, **options
    )
    return c, a.double() @ b.double(), counters


@pytest.mark.parametrize(
    ("dtype", "tile", "num_stages", "num_warps"),
    [
        *((torch.bfloat16, (64, 64, 32), 1, 4), (torch.bfloat16, (128, 64, 64), 2, 8)),
        *((torch.bfloat16, (32, 128, 32), 4, 4), (torch.float16, (64, 64, 32), 3, 4)),
        *((torch.float32, (64, 64, 32), 1, 4), (torch.float32, (128, 64, 64), 3, 8)),
    ],
)
def test_pipelines(dtype: torch.dtype, tile: tuple[int, int, int], num_stages: int, num_warps: int) -> None:
    options = {"num_stages": num_stages, "num_warps": num_warps}
    got, want, counters = multiply(dtype, torch.float32, (128, 128, 256), tile, **options)
    assert (got.double() - want).abs().max() < TOLERANCE[dtype]
    assert counters.flops == 2 * 128 * 128 * 256


@pytest.mark.parametrize(
    ("dtype", "shape", "num_stages"),
    [
        *((torch.bfloat16, (97, 70, 100), 3), (torch.float16, (33, 129, 48), 2)),
        *((torch.float32, (128, 128, 20), 3), (torch.bfloat16, (97, 70, 100), 1)),
    ],
)
def test_masked_edges(dtype: torch.dtype, shape: tuple[int, int, int], num_stages: int) -> None:
    got, want, _ = multiply(dtype, torch.float32, shape, (64, 64, 32), num_stages=num_stages)
    assert (got.double() - want).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("dtype", "transposed"),
    [
        *((torch.bfloat16, (True, False)), (torch.bfloat16, (False, True))),
        *((torch.float32, (True, True)), (torch.int8, (False, True)), (torch.int8, (True, False))),
    ],
)
def test_transposed_operands(dtype: torch.dtype, transposed: tuple[bool, bool]) -> None:
    if dtype == torch.int8:
        shape, tile = (64, 64, 128), (64, 64, 64)
        got, want, _ = multiply(dtype, torch.int32, shape, tile, transposed, tl.int32)
        assert torch.equal(got.double(), want)
    else:
        got, want, _ = multiply(dtype, torch.float32, (64, 96, 128), (64, 32, 32), transposed)
        assert (got.double() - want).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("target", [80, 89])
def test_output_in_bf16(target: int) -> None:
    shape, tile = (128, 128, 128), (64, 64, 32)
    got, want, _ = multiply(torch.bfloat16, torch.bfloat16, shape, tile, target=target)
    assert (got.double() - want).abs().max() <= want.abs().max() * 2**-8  # half a unit in the last place


def test_fp8() -> None:
    got, want, counters = multiply(torch.float8_e4m3fn, torch.float32, (64, 64, 128), (64, 64, 64))
    assert (got.double() - want).abs().max() < EXACT_PRODUCTS
    assert any("e4m3" in name for name in counters.mma)


def test_fp64() -> None:
    got, want, _ = multiply(torch.float64, torch.float64, (32, 32, 64), (32, 32, 32), acc=tl.float64)
    assert (got - want).abs().max() < 1e-12


def test_accumulation_in_fp16() -> None:
    got, want, counters = multiply(torch.float16, torch.float32, (64, 64, 64), (64, 64, 32), acc=tl.float16)
    assert (got.double() - want).abs().max() < 0.1  # sums of up to 30 have a unit of 2^-6 in the last place
    assert any(".f16.f16.f16.f16" in name for name in counters.mma)


def test_batching_changes_nothing() -> None:
    results = []
    for batch in (1, 3, 16):
        torch.manual_seed(1)
        got, _, counters = multiply(
            torch.bfloat16, torch.float32, (128, 128, 64), (32, 32, 32), emu={"batch": batch}
        )
        counts = counters.as_dict()
        del counts["seconds"]
        results.append((got, counts))
    for got, counts in results[1:]:
        assert torch.equal(got, results[0][0])
        assert counts == results[0][1]


@pytest.mark.parametrize(
    ("length", "num_stages", "causal"), [(128, 2, True), (100, 3, False), (100, 1, True)]
)
def test_attention(length: int, num_stages: int, causal: bool) -> None:
    q, k, v = (torch.randn(2, length, 64).bfloat16() for _ in range(3))
    o = torch.full_like(q, torch.nan)
    blocks = {"D": 64, "BM": 64, "BN": 32, "CAUSAL": causal, "num_stages": num_stages}
    launch(kernels.attention, (-(-length // 64), 2), q, k, v, o, length, 0.125, **blocks)
    want = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=causal
    )
    assert (o.double() - want).abs().max() < 0.02  # weights and outputs are rounded to bf16


@pytest.mark.parametrize(("num_stages", "num_warps"), [(1, 4), (2, 1), (3, 4), (4, 4)])
def test_loops_of_their_own_length_in_a_batch(num_stages: int, num_warps: int) -> None:
    """The pipelined loop runs under masks, cp.async and its waits too."""
    lengths = torch.tensor([0, 1, 16, 31, 32, 64, 100, 128, 160], dtype=torch.int32)
    a, b = torch.randn(9, 32, 160).bfloat16(), torch.randn(9, 160, 32).bfloat16()
    c = torch.full((9, 32, 32), torch.nan)
    options = {"num_stages": num_stages, "num_warps": num_warps, "emu": {"racecheck": num_warps > 1}}
    launch(kernels.ragged_matmul, (9,), a, b, c, lengths, 160, BM=32, BN=32, BK=32, **options)
    for i, n in enumerate(lengths.tolist()):
        want = a[i, :, :n].double() @ b[i, :n].double()
        assert (c[i].double() - want).abs().max() < EXACT_PRODUCTS
