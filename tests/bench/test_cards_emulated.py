"""What a card says of the emulated run, from counters that are known."""

from __future__ import annotations

from collections import Counter

import pytest

pytest.importorskip("triton", reason="kernels are compiled by triton")

from qtrain.bench.cards_emulated import emulate, filling, summary
from qtrain.bench.examples import Shape
from qtrain.bench.ptx import RTX4090, Counters
from qtrain.kernels import nf4_triton
from tests.bench.compiled_kernels import copy


def counters() -> Counters:
    """Two CTAs: 2^20 multiply-adds each, 1 MiB read twice and once missed by a sector, 64 KiB written."""
    made = Counters(ctas=2, threads=128, shared_bytes=1024)
    made.mma["m16n8k16.bf16.f32"] = 1024
    made.mma_flops["m16n8k16.bf16.f32"] = 2 * 2 * 2**20
    made.instr.update({"fp32": 4096, "mov": 10**6})
    made.gmem["load"].update({"requests": 4096, "bytes": 2 * 2**20, "sectors": 2 * 2**20 // 32})
    made.gmem["store"].update({"requests": 128, "bytes": 2**16, "sectors": 2**16 // 32})
    made.smem["load"].update({"requests": 100, "wavefronts": 500, "ideal": 400})
    made.unique_read, made.unique_write = 2**20 + 32, 2**16
    return made


def test_ratios_and_times() -> None:
    seen = summary(counters(), ideal_bytes=2**20 + 2**16, shape={"rows": 1})
    assert seen.touched == pytest.approx(1 + 32 / (2**20 + 2**16))
    assert seen.moved == pytest.approx((2 * 2**20 + 2**16) / (2**20 + 2**16))
    assert seen.conflicts == 1.25
    # 2^21 multiply-adds at 256 a clock on each of 128 multiprocessors; 1.06 MiB at 1008 GB/s
    assert seen.times_us["tensor"] == pytest.approx(2**21 / 256 / 128 / 2520)
    assert seen.times_us["DRAM"] == pytest.approx((2**20 + 32 + 2**16) / 1.008e6)
    assert seen.times_us["issue"] == pytest.approx(4096 / 4 / 128 / 2520)  # mov is free
    assert seen.bound == "DRAM"
    assert seen.roofline_us == pytest.approx((2**20 + 2**16) / 1.008e6)
    low, high = seen.of_roofline
    assert high == pytest.approx(1 / seen.touched)
    terms = ("issue", "tensor", "shared", "DRAM")
    assert low == pytest.approx(seen.roofline_us / sum(seen.times_us[name] for name in terms))
    assert seen.as_dict()["of_roofline"] == seen.of_roofline


def test_filling_multiplies_everything_that_is_modelled() -> None:
    one, many = counters(), filling(counters(), RTX4090.sms)
    assert many.ctas == 2 * 128
    assert many.flops == 128 * one.flops
    assert many.gmem["load"]["sectors"] == 128 * one.gmem["load"]["sectors"]
    assert many.smem["load"] == Counter({"requests": 12800, "wavefronts": 64000, "ideal": 51200})
    assert (many.unique_read, many.instr["fp32"]) == (128 * one.unique_read, 128 * 4096)


def test_without_shared_memory_there_are_no_conflicts() -> None:
    made = counters()
    made.smem.clear()
    assert summary(made, ideal_bytes=2**20, shape={}).conflicts == 1.0


def test_a_dequantisation_moves_every_byte_once() -> None:
    seen = emulate(nf4_triton.specimens()[0], Shape(rows=1, outputs=128, inner=128))
    assert seen is not None
    assert seen.flops == 0
    assert seen.bound == "DRAM"
    # the sectors are whole: what is smaller than one (codes, scales) counts as one each
    assert 1 <= seen.touched < 1.1


def test_a_kernel_without_an_example_is_left_out() -> None:
    assert emulate(copy()) is None
