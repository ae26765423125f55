"""Small Triton kernels whose compiled code is known, as specimens."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from qtrain.kernels.specimens import Specimen


@triton.jit
def copy_kernel(x_ptr, y_ptr, rows, stride, COLUMNS: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + row * stride + columns, mask=row < rows)
    tl.store(y_ptr + row * stride + columns, x, mask=row < rows)


@triton.jit
def gemm_kernel(
    x_ptr, w_ptr, y_ptr, K, x_stride, w_stride, y_stride, BLOCK: tl.constexpr, STEP: tl.constexpr
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    step = tl.arange(0, STEP)
    x_place = x_ptr + row[:, None] * x_stride + step[None, :]
    w_place = w_ptr + column[:, None] * w_stride + step[None, :]
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for _ in range(0, K, STEP):
        acc = tl.dot(tl.load(x_place), tl.trans(tl.load(w_place)), acc)
        x_place += STEP
        w_place += STEP
    tl.store(y_ptr + row[:, None] * y_stride + column[None, :], acc.to(tl.bfloat16))


def copy(*, aligned: bool = True, columns: int = 1024, **options: Any) -> Specimen:
    """Rows of `columns` bf16 values; without `aligned` the compiler knows nothing of the row's start."""
    return Specimen(
        name=f"copy {columns} {'aligned' if aligned else 'unaligned'}",
        kernel=copy_kernel,
        signature={"x_ptr": "*bf16", "y_ptr": "*bf16", "rows": "i32", "stride": "i32"},
        constexprs={"COLUMNS": columns},
        aligned=frozenset({"stride"} if aligned else ()),
        num_warps=4,
        num_stages=3,
        budget="light",
        hot=("x_ptr", "y_ptr"),
        options={"enable_fp_fusion": False, **options},
    )


def gemm(
    *, block: int = 128, step: int = 64, num_warps: int = 8, budget: str = "bf16_gemm", **options: Any
) -> Specimen:
    """y = x w^T in bf16, all sizes multiples of the tile's."""
    integers = ("K", "x_stride", "w_stride", "y_stride")
    return Specimen(
        name=f"gemm {block}x{block}x{step}",
        kernel=gemm_kernel,
        signature=dict.fromkeys(("x_ptr", "w_ptr", "y_ptr"), "*bf16") | dict.fromkeys(integers, "i32"),
        constexprs={"BLOCK": block, "STEP": step},
        aligned=frozenset(integers),
        num_warps=num_warps,
        num_stages=3,
        budget=budget,
        hot=("x_ptr", "w_ptr", "y_ptr"),
        options={"enable_fp_fusion": False, **options},
    )
