"""Whole Triton kernels against PyTorch: elementwise, reductions, scans, atomics, conversions, random bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from qtrain.bench.ptx import launch
from tests.bench.ptx import device_kernels as kernels

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("n", "dtype"),
    [
        *((1000, torch.float32), (1024, torch.bfloat16), (37, torch.float16)),
        *((1000, torch.int32), (37, torch.int64), (1000, torch.float64)),
    ],
)
def test_addition(n: int, dtype: torch.dtype) -> None:
    x, y = (torch.randn(n) * 10).to(dtype), (torch.randn(n) * 10).to(dtype)
    z = torch.zeros(n + 8, dtype=dtype)
    launch(kernels.vadd, lambda args: (-(-n // args["B"]),), x, y, z, n, B=256)
    assert torch.equal(z[:n], x + y)
    assert not z[n:].any()


@pytest.mark.parametrize("target", [80, 89])
def test_vectorised_loads(target: int) -> None:
    x, y, z = torch.randn(4096), torch.randn(4096), torch.zeros(4096)
    counters = launch(kernels.vadd_unmasked, (4,), x, y, z, B=1024, target=target)
    assert torch.equal(z, x + y)
    # 128-bit loads: a request of a warp brings 128 elements
    assert counters.gmem["load"]["requests"] == 2 * 4096 // 128
    assert "ld.global.v4.b32" in counters.kernel.asm["ptx"]


def test_numpy_arrays() -> None:
    x, y, z = (np.arange(512, dtype=np.float32) for _ in range(3))
    launch(kernels.vadd, (2,), x, y, z, 512, B=256)
    assert (z == x + y).all()


@pytest.mark.parametrize(
    ("dtype", "n", "num_warps"),
    [(torch.float32, 128, 1), (torch.float32, 781, 8), (torch.bfloat16, 781, 4)],
)
def test_softmax(dtype: torch.dtype, n: int, num_warps: int) -> None:
    x = torch.randn(7, n).to(dtype)
    y = torch.full_like(x, torch.nan)
    launch(kernels.softmax, (7,), x, y, n, x.stride(0), y.stride(0), B=1024, num_warps=num_warps)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8  # half a unit in the last place of bf16
    torch.testing.assert_close(y.float(), torch.softmax(x.float(), -1), rtol=tolerance, atol=tolerance)


def test_loop_over_a_row() -> None:
    x, w, b = torch.randn(9, 500), torch.randn(500), torch.randn(500)
    y = torch.full_like(x, torch.nan)
    launch(kernels.layernorm, (9,), x, w, b, y, 500, 1e-5, B=128)
    want = torch.nn.functional.layer_norm(x, (500,), w, b, 1e-5)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)  # sums in another order


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_atomics(dtype: torch.dtype) -> None:
    x, index = (torch.randn(700) * 100).to(dtype), torch.randint(0, 5, (700,), dtype=torch.int32)
    total, count = torch.zeros(5, dtype=dtype), torch.zeros(1, dtype=torch.int32)
    largest = torch.full((5,), -10000, dtype=dtype)
    launch(kernels.atomics, (3,), x, index, total, largest, count, 700, B=256)
    want = torch.zeros(5, dtype=torch.float64).index_add_(0, index.long(), x.double())
    torch.testing.assert_close(total.double(), want, rtol=1e-5, atol=1e-2)  # fp32 sums of 140 terms
    assert count.item() == 3
    assert torch.equal(largest, torch.stack([x[index == i].max() for i in range(5)]))


def test_atomics_of_halves() -> None:
    x, out = torch.randint(-4, 5, (128,)).half(), torch.zeros(4).half()
    launch(kernels.atomic_half, (1,), x, out, B=128)
    assert torch.equal(out, x.view(-1, 4).float().sum(0).half())


def test_an_atomic_returns_the_old_value() -> None:
    count, out = torch.zeros(1, dtype=torch.int32), torch.full((40, 32), -1, dtype=torch.int32)
    launch(kernels.ticket, (40,), count, out, B=32, num_warps=1)
    assert torch.equal(out[:, 0].sort().values, torch.arange(40, dtype=torch.int32))
    assert (out == out[:, :1]).all()


def test_a_lock_between_programs() -> None:
    lock, total = torch.zeros(1, dtype=torch.int32), torch.zeros(128)
    launch(kernels.spinlock, (12,), lock, total, B=128, emu={"max_steps": 200000})
    assert (total == 78).all()
    assert lock.item() == 0


@pytest.mark.parametrize(("size", "num_warps"), [(64, 1), (256, 4)])
def test_sort_scan_gather_histogram(size: int, num_warps: int) -> None:
    x = torch.rand(size)
    ordered, running, gathered = (torch.zeros(size) for _ in range(3))
    largest, histogram = torch.zeros(1, dtype=torch.int32), torch.zeros(16, dtype=torch.int32)
    outputs = (ordered, running, gathered, largest, histogram)
    launch(kernels.sort_scan, (1,), x, *outputs, B=size, num_warps=num_warps, emu={"racecheck": True})
    assert torch.equal(ordered, x.sort().values)
    torch.testing.assert_close(running, x.cumsum(0), rtol=1e-5, atol=1e-4)
    assert torch.equal(gathered, x[(torch.arange(size) * 7 + 3) % size])
    assert largest.item() == x.argmax().item()
    assert torch.equal(histogram.float(), torch.histc(x, 16, 0, 1))


INTERPRETED = """
import json, torch
from tests.bench.ptx import device_kernels as kernels
x, y = torch.arange(600, dtype=torch.float32) + 1, torch.zeros(600)
kernels.dropout[(3,)](x, y, 1234, 0.3, 600, B=256)
z, words = torch.zeros(256), torch.zeros(128, 4, dtype=torch.int32)
kernels.normals[(1,)](z, 77, B=256)
kernels.philox_words[(1,)](words, 1234567, B=128)
print(json.dumps([y.tolist(), z.tolist(), words.tolist()]))
"""


def test_random_numbers_match_the_interpreters() -> None:
    """Philox is multiplications of 32 x 32 bits with their upper halves."""
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    dropped, normal, drawn = (torch.tensor(values) for values in json.loads(done.stdout.splitlines()[-1]))
    x, y, z = torch.arange(600, dtype=torch.float32) + 1, torch.zeros(600), torch.zeros(256)
    words = torch.zeros(128, 4, dtype=torch.int32)
    launch(kernels.dropout, (3,), x, y, 1234, 0.3, 600, B=256)
    launch(kernels.normals, (1,), z, 77, B=256)
    launch(kernels.philox_words, (1,), words, 1234567, B=128)
    assert torch.equal(y == 0, dropped == 0)
    assert 0.2 < (y == 0).float().mean() < 0.4
    torch.testing.assert_close(y, dropped)
    torch.testing.assert_close(z, normal, rtol=1e-4, atol=1e-5)  # sin and log of two libraries
    assert torch.equal(words, drawn)


ELEMENTWISE: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sin": torch.sin,
    "exp": torch.exp,
    "log": lambda v: (v.abs() + 1e-3).log(),
    "erf": torch.erf,
    "sqrt": lambda v: 2 * v.abs().sqrt() + (v.abs() + 1).rsqrt(),
    "div": lambda v: v / (v * v + 1) + v / (v * v + 2),
    "floor": lambda v: v.floor() + (2 * v).ceil(),
    "sigmoid": torch.sigmoid,
    "minmax": lambda v: v.clamp(max=0.5) + v.clamp(min=-0.25) + v.clamp(-1, 1),
}


@pytest.mark.parametrize("op", ELEMENTWISE)
def test_elementwise(op: str) -> None:
    x, y = torch.randn(500) * 4, torch.zeros(500)
    if op == "sin":  # the slow reduction of the argument: divergent branches, local memory, a constant table
        x[:50] *= 1e5
    counters = launch(kernels.elementwise, (2,), x, y, 500, OP=op, B=256)
    # a few units in the last place of fp32
    torch.testing.assert_close(y.double(), ELEMENTWISE[op](x.double()), rtol=3e-6, atol=1e-6)
    assert (counters.instr["st.local"] > 0) == (op == "sin")


@pytest.mark.parametrize(
    ("given", "to", "target"),
    [
        *((torch.float32, torch.bfloat16, 80), (torch.float32, torch.float16, 89)),
        *((torch.bfloat16, torch.float16, 80), (torch.bfloat16, torch.float32, 89)),
        *((torch.float16, torch.bfloat16, 89), (torch.float16, torch.float8_e5m2, 80)),
        *((torch.float32, torch.float8_e4m3fn, 89), (torch.float8_e4m3fn, torch.bfloat16, 89)),
    ],
)
def test_conversions(given: torch.dtype, to: torch.dtype, target: int) -> None:
    drawn = torch.cat([torch.randn(200), torch.randn(200) * 50, torch.randn(100) * 1e-3])
    x = torch.cat([drawn, torch.tensor([0.0, -0.0, 1.0, -1.0])]).clamp(-200, 200).to(given)
    y = torch.zeros(x.numel()).to(to)
    launch(kernels.convert, (2,), x, y, x.numel(), B=256, target=target)
    # Triton rounds ties to fp8 another way than torch does
    agreeing = 0.97 if to.itemsize == 1 else 1.0
    assert (y.float() == x.to(to).float()).float().mean() >= agreeing


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integer_operations(dtype: torch.dtype) -> None:
    x, y = torch.randint(-10000, 10000, (300,), dtype=dtype), torch.randint(1, 100, (300,), dtype=dtype)
    y[::3] *= -1
    out = torch.zeros(5, 300, dtype=dtype)
    launch(kernels.integer_operations, (2,), x, y, out, 300, B=256)
    assert torch.equal(out[0], torch.div(x, y, rounding_mode="trunc"))
    assert torch.equal(out[1], torch.fmod(x, y))
    assert torch.equal(out[2], x * y + (x >> 3) - (y << 2))
    assert torch.equal(out[3], (x & y) ^ (x | ~y))
    assert torch.equal(out[4], torch.minimum(x, y) + torch.maximum(x, y) * x.abs())


def test_inline_assembly() -> None:
    x = torch.randint(-(2**31), 2**31 - 1, (256,), dtype=torch.int32)
    y = torch.zeros_like(x)
    launch(kernels.bytes_reversed, (1,), x, y, B=256)
    assert (y.numpy() == x.numpy().byteswap()).all()


def test_table_by_byte_permutation() -> None:
    x = torch.randint(0, 256, (512,), dtype=torch.uint8)
    y, low = torch.zeros_like(x), x & 15
    launch(kernels.nibble_table, (1,), x, y, B=512)
    assert torch.equal(y, torch.where(low < 8, 0x10 + low, 0x20 + low - 8).to(torch.uint8))


def test_table_in_the_lanes_of_a_warp() -> None:
    codes, y = torch.randint(0, 16, (512,), dtype=torch.int32), torch.zeros(512)
    counters = launch(kernels.lane_table, (1,), codes, y, B=512)
    assert torch.equal(y, (codes & 15) / 2)
    assert counters.instr["shfl"] == 512 // 32


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_two_halves_in_one_register(kind: str, dtype: torch.dtype) -> None:
    x, y = torch.randn(128, 2) * 100, torch.zeros(128, dtype=torch.int32)
    launch(kernels.two_halves, (1,), x, y, KIND=kind, B=128)
    assert torch.equal(y.view(dtype).view(128, 2), x.to(dtype))


@pytest.mark.parametrize("batch", [None, 1, 3])
def test_programs_of_their_own_length(batch: int | None) -> None:
    lengths = torch.randint(0, 9, (21,), dtype=torch.int32)
    x, y = torch.randn(21, 9, 64), torch.zeros(21, 64)
    launch(kernels.ragged, (21,), lengths, x, y, 9, B=64, num_warps=2, emu={"batch": batch})
    sums = [x[i, :n].sum(0) * (-1 if n % 2 else 1) for i, n in enumerate(lengths.tolist())]
    want = torch.stack(sums)
    torch.testing.assert_close(y, want + want.sum(1, keepdim=True), rtol=1e-5, atol=1e-4)


def test_cache_policies() -> None:
    x, y, z = torch.randn(1024), torch.randn(1024), torch.zeros(1024)
    counters = launch(kernels.policies, (2,), x, y, z, B=512)
    assert torch.equal(z, x + y)
    assert "createpolicy" in counters.kernel.asm["ptx"]


def test_functions_that_are_not_inlined() -> None:
    def helper(a: int, b: int) -> int:
        result = a * b
        return (result - 2 * b if result > 50 else result) + 1

    x, y = torch.randn(64), torch.zeros(20, 64)
    counters = launch(kernels.calls, (20,), x, y, B=64, num_warps=2)
    assert "call.uni" in counters.kernel.asm["ptx"]
    for program in range(20):
        total = helper(program, 3)
        for i in range(3):
            total = helper(program + i, total)
        torch.testing.assert_close(y[program], x + total)


def test_64_bit_addresses() -> None:
    """Offsets of 127 * 2^33 elements that cancel: in 32 bits they would not."""
    x, y = torch.randn(128), torch.zeros(128)
    launch(kernels.far, (1,), x, y, 2**33, 2**33 - 1, B=128)
    assert torch.equal(y, x.flip(0))
