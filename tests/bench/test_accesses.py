"""Which argument an access of a PTX program goes through."""

from __future__ import annotations

from collections import Counter

from qtrain.bench.accesses import SCRATCH, UNKNOWN, Access, global_accesses, widths_by_pointer

PTX = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u64 .ptr .global .align 1 kernel_param_1,
	.param .u32 kernel_param_2,
	.param .u64 .ptr .global .align 1 kernel_param_3
)
.reqntid 128
{
	.reg .pred 	%p<4>;
	.loc	1 12 0                          // ld.global.b32 of a comment
	ld.param.b64 	%rd1, [kernel_param_0];
	ld.param.b64 	%rd2, [kernel_param_1+0];
	ld.param.b32 	%r1, [kernel_param_2];
	ld.param.b64 	%rd3, [kernel_param_3];
	mov.b64 	%rd10, %rd1;
$L__BB0_1:                              // a loop: %rd10 moves on
	mad.wide.s32 	%rd11, %r1, 2, %rd10;
	// begin inline asm
	mov.u32 %r2, 0x0;
	@%p1 ld.global.L1::evict_last.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd11 + 0 ];
	// end inline asm
	// begin inline asm
	{ .reg .b32 low; shfl.sync.idx.b32 low, %r2, 0, 31, -1; mov.b32 %r9, low; }
	// end inline asm
	cp.async.cg.shared.global [ %r6 + 0 ], [ %rd2 + 64 ], 0x10, %r7;
	@!%p2 cp.async.ca.shared.global.L2::cache_hint [ %r6 + 0 ], [ %rd2 + 0 ], 0x4, %r7, %rd1;
	add.s64 	%rd10, %rd10, 128;
	@%p3 bra 	$L__BB0_1;
	selp.b64 	%rd12, %rd1, %rd2, %p1;
	ld.global.u16 	%rs1, [%rd12];
	ld.global.b64 	%rd13, [%rd1];
	st.global.v2.b32 	[%rd13], {%r2, %r3};
	st.global.b8 	[%rd3+1], %rs1;
	atom.global.add.f32 	%f1, [%rd2], %f2;
	st.shared.v4.b32 	[%r6], {%r2, %r3, %r4, %r5};
	ret;
}
"""


def test_accesses_in_order() -> None:
    assert global_accesses(PTX, ["x", "w", None]) == [
        Access("load", 128, frozenset({"x"})),
        Access("copy", 128, frozenset({"w"})),
        Access("copy", 32, frozenset({"w"})),
        Access("load", 16, frozenset({"x", "w"})),
        Access("load", 64, frozenset({"x"})),
        Access("store", 64, frozenset({UNKNOWN})),
        Access("store", 8, frozenset({SCRATCH})),
        Access("atomic", 32, frozenset({"w"})),
    ]


def test_widths_by_pointer() -> None:
    table = widths_by_pointer(global_accesses(PTX, ["x", "w", None]))
    assert table["x"] == {"load": Counter({128: 1, 16: 1, 64: 1})}
    assert table["w"] == {
        "copy": Counter({128: 1, 32: 1}),
        "load": Counter({16: 1}),
        "atomic": Counter({32: 1}),
    }
