"""Reading what cuobjdump and nvdisasm print, and finding loops in it."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from qtrain.bench.control_flow import loops
from qtrain.bench.sass import Sass, code, count_sass, disassemble, parse_listing, parse_resources

RESOURCES = """
Resource usage:
 Common:
  GLOBAL:0
 Function gemm_kernel:
  REG:143 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[0]:416 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

# Two loops in a third; the second holds most of the HMMA, and a block of it was moved behind the EXIT. At the
# end the padding that ptxas adds.
SASS = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
        /*0020*/                   LDG.E.EL.64.CONSTANT R8, desc[UR4][R2.64] ;
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R10.reuse, R4 ;
        /*0040*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0050*/               @P0 BRA 0x30 ;
        /*0060*/                   HMMA.16816.F32.BF16 R4, R8, R10.reuse, R4 ;
        /*0070*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0080*/                   LDGSTS.E.BYPASS.128 [R37+0x2000], desc[UR10][R16.64], P1 ;
        /*0090*/               @P2 BRA 0x120 ;
        /*00a0*/                   LDSM.16.M88.4 R56, [R138+0x8000] ;
        /*00b0*/                   NOP ;
        /*00c0*/                   BRA.U UP0, 0x60 ;
        /*00d0*/              @!P1 BRA 0x10 ;
        /*00e0*/                   STG.E.U16 desc[UR4][R2.64], R4 ;
        /*00f0*/                   STG.E desc[UR4][R2.64], R4 ;
        /*0100*/                   STL.64 [R1+0x8], R4 ;
        /*0110*/                   EXIT ;
        /*0120*/                   LDS R4, [R5] ;
        /*0130*/                   BRA 0xa0 ;
        /*0140*/                   BRA 0x140;
        /*0150*/                   NOP;
"""


def sass_of(text: str) -> Sass:
    return count_sass(parse_listing(text))


def test_resources() -> None:
    used = parse_resources(RESOURCES)
    assert (used.registers, used.stack_bytes, used.shared_bytes) == (143, 16, 1024)


def test_resources_that_cannot_be_read() -> None:
    with pytest.raises(ValueError, match="no REG, STACK and SHARED"):
        parse_resources("cuobjdump fatal   : Memory allocation failure")


def test_access_widths_and_spills() -> None:
    sass = sass_of(SASS)
    assert sass.accesses == {
        "LDG": Counter({128: 1, 64: 1}),
        "LDGSTS": Counter({128: 1}),
        "STG": Counter({16: 1, 32: 1}),
    }
    assert sass.instructions["STL"] == 1
    assert sass.instructions["HMMA"] == 3


def test_the_main_loop_is_the_innermost_with_the_most_hmma() -> None:
    """The block behind the EXIT belongs to it; NOP, the outer loop and the padding don't."""
    loop = sass_of(SASS).main_loop
    assert loop is not None
    assert loop.instructions == Counter({"HMMA": 2, "BRA": 3, "LDGSTS": 1, "LDSM": 1, "LDS": 1})
    assert (loop.mma, loop.other, loop.other_per_mma) == (2, 6, 3.0)


def test_without_hmma_the_longest_innermost_loop_counts() -> None:
    loop = sass_of(SASS.replace("HMMA", "FFMA")).main_loop
    assert loop is not None
    assert loop.instructions["FFMA"] == 2
    assert loop.other_per_mma is None


def test_code_without_loops() -> None:
    straight = SASS.replace("BRA", "NOP").replace("`(.L_x_", "(x")
    assert sass_of(straight).main_loop is None


def test_warp_group_products_are_seen() -> None:
    loop = sass_of(SASS.replace("HMMA.16816", "HGMMA.64x128x16")).main_loop
    assert loop is not None
    assert loop.mma == 2


def test_targets_count_from_the_first_instruction_of_all() -> None:
    """As they do when several kernels are disassembled together."""
    moved = re.sub(r"0x(\w+)( ?;)", lambda match: f"{int(match[1], 16) + 160:#x}{match[2]}", SASS)
    assert count_sass(parse_listing(moved), first=10) == sass_of(SASS)


def test_scheduling_beside_the_operands_is_not_one() -> None:
    marked = SASS.replace(" ;", "      &req={1,2} &wr=0x0 ?trans6")
    assert parse_listing(marked.replace("?trans6", "?WAIT5_END_GROUP")) == parse_listing(SASS)
    assert parse_listing(marked) == parse_listing(SASS)


def test_convergence_barriers_are_followed() -> None:
    """BSYNC goes on where its BSSY says: here out of the loop, so that the loop ends with the branch."""
    text = """
        /*0000*/                   BSSY B0, 0x50 ;
        /*0010*/                   FFMA R1, R1, R2, R3 ;
        /*0020*/              @!P0 BRA 0x10 ;
        /*0030*/                   BSYNC B0 ;
        /*0040*/                   BRA 0x10 ;
        /*0050*/                   EXIT ;
    """
    loop = sass_of(text).main_loop
    assert loop is not None
    assert loop.instructions == Counter({"FFMA": 1, "BRA": 1})


def test_kernels_disassembled_together_are_told_apart() -> None:
    pytest.importorskip("triton", reason="brings the disassembler")
    from qtrain.bench.aot import compile_specimen
    from tests.bench.compiled_kernels import copy, gemm

    codes = [code(compile_specimen(one, 89).cubin) for one in (gemm(), copy(), gemm())]
    first, second, third = disassemble(codes, "SM89")
    assert [len(one) * 16 for one in (first, second, third)] == list(map(len, codes))
    alone = count_sass(*disassemble(codes[:1], "SM89"))
    assert count_sass(first) == alone
    assert count_sass(third, first=len(first) + len(second)) == alone
    assert count_sass(second).accesses["LDG"] == Counter({128: 1})


def test_what_is_no_code_is_an_error() -> None:
    pytest.importorskip("triton", reason="brings the disassembler")
    with pytest.raises(ValueError, match="nvdisasm"):
        disassemble([b"no code"], "SM89")


@pytest.mark.parametrize(
    ("edges", "bodies"),
    [
        ([[1], [2], []], []),
        # one loop with two ways back
        ([[1], [2, 3], [1], [1, 4], []], [{1, 2, 3}]),
        # a loop in a loop
        ([[1], [2], [3], [2, 4], [1, 5], []], [{1, 2, 3, 4}, {2, 3}]),
        # a jump back to a place that is reached past it too is no loop of its own: nothing dominates
        ([[1, 2], [2], [1, 3], []], []),
        # unreachable code that jumps into a loop
        ([[1], [1, 2], [], [1]], []),
    ],
)
def test_natural_loops(edges: list[list[int]], bodies: list[set[int]]) -> None:
    assert sorted(map(sorted, loops(edges))) == sorted(map(sorted, bodies))
