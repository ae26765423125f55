"""A fault in compiled code is put where it is meant, and the emulator or a comparison notices it."""

from __future__ import annotations

import pytest
import torch

from qtrain.kernels import nf4_dequantize
from tests.bench.ptx import matmul_kernels
from tests.kernels.emulated.emulation import (
    Edit,
    Fault,
    assert_noticed,
    early_wait,
    emulated,
    missing_barrier,
    missing_wait,
    no_rescaling,
    off_by_one,
)
from tests.kernels.lora_cases import nf4_weight


def check_attention(edit: Edit | None = None) -> None:
    """Flash attention over 100 keys in blocks of 32: a pipeline, masks, a running maximum."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 100, 64).bfloat16() for _ in range(3))
    o = torch.full_like(q, torch.nan)
    blocks = {"D": 64, "BM": 64, "BN": 32, "CAUSAL": False, "num_stages": 3}
    with emulated(edit) as log:
        matmul_kernels.attention[(2, 1)](q, k, v, o, 100, 0.125, **blocks)
    assert [name for name, _ in log] == ["attention"]
    want = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert (o.double() - want).abs().max() < 0.01  # weights and outputs are rounded to bf16


def check_dequantize(edit: Edit | None = None) -> None:
    weight = nf4_weight(64, 128, nested=True, generator=torch.Generator().manual_seed(0))
    want = nf4_dequantize(weight)
    with emulated(edit):
        got = nf4_dequantize(weight)
    assert torch.equal(got, want)


def test_without_a_fault() -> None:
    check_attention()
    check_dequantize()


RESCALING = "r = tl.exp2(m - mn)"
# the comparisons are made once, for the loads, and serve the softmax and the store as well
KEYS, QUERIES = "kk = tl.load(", "qq = tl.load("


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (missing_wait(), ""),
        (missing_wait(which=0), ""),
        (early_wait(), ""),
        (missing_barrier(), "shared-memory race"),
        (no_rescaling(at=RESCALING), ""),
        (off_by_one(at=KEYS), "out-of-bounds"),
        (off_by_one(at=QUERIES, kernel="attention"), "out-of-bounds"),
    ],
)
def test_faults_of_a_pipelined_kernel(fault: Fault, message: str) -> None:
    assert message in assert_noticed(check_attention, fault)


@pytest.mark.parametrize(
    "fault",
    [
        Fault(r"(and\.b32\s+\S+, lane, )15;", r"\g<1>7;"),  # the upper half of the table is lost
        Fault(r"(and\.b32\s+\S+, lane, )15;", r"\g<1>14;"),
    ],
)
def test_a_wrong_decode_table(fault: Fault) -> None:
    assert_noticed(check_dequantize, fault)


def test_a_fault_that_changes_nothing_is_no_proof() -> None:
    with pytest.raises(AssertionError, match="there is no"):
        assert_noticed(check_dequantize, Fault(r"frobnicate", ""))
    with pytest.raises(AssertionError, match="there is no"):
        assert_noticed(check_dequantize, missing_barrier(kernel="attention"))


def test_a_fault_without_effect_is_reported() -> None:
    with pytest.raises(AssertionError, match="went unnoticed"):
        assert_noticed(check_dequantize, Fault(r"^\s*ret;", "nanosleep.u32 1; ret;"))
