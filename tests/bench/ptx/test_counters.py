"""Counts that can be worked out by hand, and the estimate made of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qtrain.bench.ptx import RTX4090, estimate, launch, occupancy, resource_usage
from qtrain.bench.ptx.counters import sectors, wavefronts
from tests.bench.ptx import device_kernels, matmul_kernels


def test_sectors() -> None:
    address = np.arange(64, dtype=np.uint64) * 4 + 4096
    assert sectors(address, None) == (2, 8)  # 128 bytes each warp
    assert sectors(address * 8, None) == (2, 64)  # a sector each lane
    assert sectors(address[::-1].copy(), None) == (2, 8)  # the order does not matter
    assert sectors(address + 4, None) == (2, 10)  # off alignment: one more
    mask = np.zeros(64, bool)
    mask[3:5] = True
    assert sectors(address, mask) == (1, 1)
    assert sectors(np.full(64, 100, np.uint64), None) == (2, 2)


@pytest.mark.parametrize(
    ("stride", "size", "want"),
    [
        *((0, 4, 1), (4, 4, 1), (8, 4, 2), (128, 4, 32), (132, 4, 1), (2, 2, 1)),
        *((8, 8, 2), (16, 16, 4), (32, 16, 8), (128, 16, 32), (144, 16, 4)),
    ],
)
def test_bank_conflicts(stride: int, size: int, want: int) -> None:
    address = np.arange(32, dtype=np.uint32) * stride
    assert wavefronts(address, size, None) == (1, want, {2: 1, 4: 1, 8: 2, 16: 4}[size])


def test_gemm() -> None:
    size = 256
    a, b, c = (torch.randn(size, size).bfloat16() for _ in range(3))
    sizes = (size, size, size, size, 1, size, 1, size, 1)
    blocks = {"BM": 64, "BN": 64, "BK": 32, "MASK": False, "num_warps": 4, "num_stages": 3}
    counters = launch(matmul_kernels.matmul, (4, 4), a, b, c, *sizes, **blocks)
    assert counters.flops == 2 * size**3
    assert sum(counters.mma.values()) == size**3 // (16 * 8 * 16)
    copied = counters.gmem["cp.async"]
    assert copied["bytes"] == 16 * 8 * (64 * 32 + 32 * 64) * 2  # 16 CTAs, 8 steps of k
    assert copied["sectors"] * 32 == copied["bytes"]
    assert counters.unique_read == 2 * size * size * 2
    assert counters.unique_write == counters.gmem["store"]["bytes"] == size * size * 2
    assert counters.smem["ldmatrix"]["wavefronts"] == counters.smem["ldmatrix"]["ideal"]  # swizzled
    modelled = estimate(counters)
    traffic = 3 * size * size * 2
    assert modelled.times["DRAM"] == pytest.approx(traffic / RTX4090.dram * 1e6)
    # 16 CTAs on 128 multiprocessors: the work of one CTA at 256 multiply-adds a clock
    assert modelled.times["tensor"] == pytest.approx(64 * 64 * size / 256 / RTX4090.ghz * 1e-3)
    assert modelled.resources == resource_usage(counters.kernel)
    assert 0 < modelled.resources["reg"] <= 255
    assert "16 CTAs x 128 threads" in str(counters)
    assert f"bound by {modelled.bound}" in str(modelled)


def test_addition_is_bound_by_memory() -> None:
    n = 1 << 14
    x, y, z = torch.zeros(n), torch.zeros(n), torch.zeros(n)
    counters = launch(device_kernels.vadd_unmasked, (n // 1024,), x, y, z, B=1024)
    assert counters.gmem["load"]["sectors"] == 2 * n * 4 // 32
    assert (counters.unique_read, counters.unique_write) == (8 * n, 4 * n)
    assert counters.instr["fp32"] == n // 32
    assert estimate(counters).bound in ("DRAM", "L2")


def test_counters_can_be_switched_off() -> None:
    x, y, z = torch.randn(1024), torch.randn(1024), torch.zeros(1024)
    counters = launch(device_kernels.vadd_unmasked, (1,), x, y, z, B=1024, emu={"counters": False})
    assert torch.equal(z, x + y)
    assert not counters.gmem
    assert counters.unique_read == 0


def test_the_worst_instruction_is_named() -> None:
    x, y = torch.randn(128, 64), torch.zeros(128)
    counters = launch(device_kernels.column, (1,), x, y, 64, B=128)
    assert counters.gmem["load"]["sectors"] == 128
    assert counters.unique_read == 128 * 32
    worst = counters.hot("sectors").splitlines()[0]
    assert "x8.00 of ideal" in worst
    assert "ld.global" in worst
    assert "device_kernels.py" in worst


def test_occupancy() -> None:
    assert occupancy(threads=128, shared=0, registers=0) == 12  # 1536 threads
    assert occupancy(threads=256, shared=48 * 1024, registers=32) == 2  # 49 of 100 KB each
    assert occupancy(threads=256, shared=0, registers=255) == 1  # 255 registers a thread
