"""The emulator must notice what a GPU would do wrong."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from qtrain.bench.ptx import EmulationError, compile_for, launch, run
from tests.bench.ptx import device_kernels, matmul_kernels
from tests.bench.ptx.assembly import HEADER

EXACT_PRODUCTS = 1e-3  # fp32 sums of 256 exact products in another order


class Gemm:
    """A compiled product of 64 x 256 by 256 x 64 in bf16, whose PTX can be edited."""

    def __init__(self, num_stages: int) -> None:
        a, b = torch.randn(64, 256).bfloat16(), torch.randn(256, 64).bfloat16()
        self.c = torch.zeros(64, 64)
        self.want = a.float() @ b.float()
        self.kernel, _, self.args = compile_for(
            matmul_kernels.matmul,
            (a, b, self.c, 64, 64, 256, 256, 1, 64, 1, 64, 1),
            {"BM": 64, "BN": 64, "BK": 32, "MASK": False},
            num_warps=4,
            num_stages=num_stages,
        )
        self.ptx: str = self.kernel.asm["ptx"]

    def error(self, ptx: str, **options: Any) -> float:
        """Run a text in the kernel's place; the largest error, NaN if anything is."""
        self.c.fill_(torch.nan)
        run(self.kernel, (1, 1), self.args, edit=lambda _: ptx, **options)
        return (self.c - self.want).abs().max().item()

    def failure(self, ptx: str, **options: Any) -> str:
        """What the emulator says of a text, or nothing."""
        try:
            self.error(ptx, **options)
        except EmulationError as error:
            return str(error)
        return ""


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_a_missing_wait(num_stages: int) -> None:
    gemm = Gemm(num_stages)
    assert gemm.error(gemm.ptx) < EXACT_PRODUCTS
    wait = r"cp\.async\.wait_group\s+(\d+);"
    without_the_first = re.sub(wait, "", gemm.ptx, count=1)
    without_any = re.sub(wait, "", gemm.ptx)
    too_early = re.sub(wait, lambda m: f"cp.async.wait_group {int(m[1]) + 2};", gemm.ptx)
    for ptx in (without_the_first, without_any, too_early):
        assert ptx != gemm.ptx
        assert not gemm.error(ptx) < EXACT_PRODUCTS  # ldmatrix reads what has not arrived: NaN
        assert torch.isnan(gemm.c).any()


@pytest.mark.parametrize("num_stages", [1, 3])
def test_a_missing_barrier_needs_the_racecheck(num_stages: int) -> None:
    gemm = Gemm(num_stages)
    assert gemm.error(gemm.ptx, racecheck=True) < EXACT_PRODUCTS
    barriers = [match.span() for match in re.finditer(r"bar\.sync\s+0;", gemm.ptx)]
    messages = []
    for start, end in barriers:
        ptx = gemm.ptx[:start] + gemm.ptx[end:]
        assert gemm.error(ptx) < EXACT_PRODUCTS  # lockstep execution hides it
        messages.append(gemm.failure(ptx, racecheck=True))
    seen = sum("shared-memory race" in message for message in messages)
    # the others stand in branches not taken, or before another barrier
    assert seen >= len(barriers) - 2
    assert seen > 0


def test_the_racecheck_accepts_correct_kernels() -> None:
    x, y = torch.randn(3, 700), torch.zeros(3, 700)
    launch(device_kernels.softmax, (3,), x, y, 700, 700, 700, B=1024, emu={"racecheck": True})
    q, k, v = (torch.randn(2, 128, 64).bfloat16() for _ in range(3))
    blocks = {"D": 64, "BM": 64, "BN": 32, "CAUSAL": True, "num_stages": 2}
    out = torch.zeros_like(q)
    launch(matmul_kernels.attention, (2, 2), q, k, v, out, 128, 0.125, **blocks, emu={"racecheck": True})


def test_out_of_bounds() -> None:
    x, y, z = torch.zeros(1024), torch.zeros(1024), torch.zeros(1000)
    place = r"st\.global.*device_kernels\.py.*CTA \(3, 0, 0\), thread \d+, address 0x.*argument 2"
    with pytest.raises(EmulationError, match=rf"(?s)out-of-bounds.*{place}"):
        launch(device_kernels.vadd, (4,), x, y, z, 1024, B=256)
    with pytest.raises(EmulationError, match=r"out-of-bounds.*ld\.global.*argument 0"):
        launch(device_kernels.vadd, (4,), x[:900], y, torch.zeros(1024), 1024, B=256)


def test_the_neighbour_in_memory_is_out_of_bounds() -> None:
    """An address beyond one tensor that happens to lie in another."""
    memory = torch.zeros(4096)
    with pytest.raises(EmulationError, match="out-of-bounds"):
        launch(device_kernels.vadd, (4,), memory[:1000], memory[1024:2048], memory[2048:3072], 1024, B=256)


def test_arguments_may_overlap() -> None:
    memory = torch.arange(2048, dtype=torch.float32)
    want = memory[:1024] * 2
    launch(device_kernels.vadd, (4,), memory[:1024], memory[:1024], memory[:1024], 1024, B=256)
    assert torch.equal(memory[:1024], want)


def test_misaligned() -> None:
    """Compiled for pointers aligned to 16 bytes, run with one that is not."""
    x, y, z = torch.zeros(1028), torch.zeros(1024), torch.zeros(1024)
    kernel, _, args = compile_for(device_kernels.vadd_unmasked, (x[:1024], y, z), {"B": 1024}, num_warps=4)
    run(kernel, (1,), args)
    with pytest.raises(EmulationError, match="misaligned 16-byte"):
        run(kernel, (1,), [x[1:1025], y, z])


def test_device_assert() -> None:
    x = torch.arange(128, dtype=torch.int32)
    launch(device_kernels.asserting, (1,), x, B=128, debug=True)
    assert x[0] == 1
    x[77] = -5
    with pytest.raises(EmulationError, match=r"assertion failed.*thread 77"):
        launch(device_kernels.asserting, (1,), x, B=128, debug=True)


SHARED = f"""{HEADER}.extern .shared .align 16 .b8 memory[];
.visible .entry k(.param .u64 p)
{{
.reg .b32 %r<4>; .reg .b64 %d<3>;
mov.u32 %r0, %tid.x; shl.b32 %r1, %r0, 2; mov.b32 %r2, memory; add.u32 %r2, %r2, %r1;
ld.shared.b32 %r3, [%r2];
ld.param.u64 %d0, [p]; mad.wide.u32 %d1, %r0, 4, %d0; st.global.b32 [%d1], %r3; ret;
}}"""


def test_uninitialised_shared_memory_is_nan() -> None:
    y = torch.zeros(32)
    run(SHARED, 1, [y], num_warps=1, shared=128)
    assert torch.isnan(y).all()


def test_shared_memory_out_of_bounds() -> None:
    with pytest.raises(EmulationError, match="out-of-bounds 4-byte shared access"):
        run(SHARED, 1, [torch.zeros(32)], num_warps=1, shared=64)


def test_misaligned_shared_memory() -> None:
    ptx = SHARED.replace("add.u32 %r2, %r2, %r1;", "add.u32 %r2, %r2, 2;")
    with pytest.raises(EmulationError, match="misaligned 4-byte shared access"):
        run(ptx, 1, [torch.zeros(32)], num_warps=1, shared=128)


BRANCH = f"""{HEADER}.visible .entry k()
{{
.reg .b32 %r<4>; .reg .pred %p;
mov.u32 %r0, %tid.x; setp.lt.u32 %p, %r0, 7; @%p bra $L2;
REST
}}"""


def test_threads_that_never_come_to_a_barrier() -> None:
    stuck = "bar.sync 0; ret; $L2: bra.uni $L2;"
    with pytest.raises(EmulationError, match="too many steps"):
        run(BRANCH.replace("REST", stuck), 1, [], num_warps=2, max_steps=1000)


def test_threads_that_leave_release_a_barrier() -> None:
    run(BRANCH.replace("REST", "bar.sync 0; $L2: ret;"), 1, [], num_warps=2, max_steps=1000)


def test_a_shuffle_without_the_whole_warp() -> None:
    shuffle = "shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1; $L2: nanosleep.u32 1; ret;"
    with pytest.raises(EmulationError, match="part of a warp absent"):
        run(BRANCH.replace("REST", shuffle), 1, [], num_warps=2)
