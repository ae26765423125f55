"""Single instructions in hand-written PTX, run on arrays of 256 threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qtrain.bench.ptx import run

Array = npt.NDArray[Any]
THREADS = 256
ONES = 0xFFFFFFFF
HEADER = ".version 8.4\n.target sm_89\n.address_size 64\n"
SCRATCH = """
.reg .b64 %p<4>; .reg .b32 %t<16>; .reg .b64 %u<8>; .reg .b16 %h<8>; .reg .pred %q<4>;
mov.u32 %t15, %tid.x;
"""


def text(body: str, inputs: int, width: int = 4, out_width: int = 4) -> str:
    """A kernel that loads %a0, %a1 ... for each thread, runs the body and stores %o."""
    params = ", ".join(f".param .u64 k_{i}" for i in range(inputs + 1))
    lines = [f"{HEADER}.visible .entry k({params})\n.reqntid {THREADS}\n{{", f".reg .b{8 * out_width} %o;"]
    lines += [f".reg .b{8 * width} %a{i};" for i in range(inputs)] + [SCRATCH]
    for i in range(inputs):
        lines.append(f"ld.param.u64 %p0, [k_{i}]; mad.wide.u32 %p0, %t15, {width}, %p0;")
        lines.append(f"ld.global.b{8 * width} %a{i}, [%p0];")
    lines.append(body)
    lines.append(f"ld.param.u64 %p0, [k_{inputs}]; mad.wide.u32 %p0, %t15, {out_width}, %p0;")
    lines.append(f"st.global.b{8 * out_width} [%p0], %o; ret;\n}}")
    return "\n".join(lines)


def execute(body: str, *inputs: Array, out_width: int = 4) -> Array:
    """What the body leaves in %o, by thread, as unsigned integers."""
    out = np.zeros(THREADS, f"u{out_width}")
    ptx = text(body, len(inputs), inputs[0].itemsize, out_width)
    run(ptx, (1,), [*inputs, out], num_warps=THREADS // 32)
    return out


def words(draw: np.random.Generator) -> Array:
    """Random 32-bit words with the interesting ones among them."""
    values = draw.integers(0, 1 << 32, THREADS, dtype=np.uint32)
    values[:16] = [
        *(0, 1, 2, 31, 32, 33, 63, 64, 255, 256, 0x7FFF, 0x8000),
        *(ONES, ONES - 1, 1 << 31, (1 << 31) - 1),
    ]
    return draw.permutation(values)


def signed(value: int, bits: int = 32) -> int:
    """Two's complement."""
    return value - (1 << bits) if value >> (bits - 1) else value


def integers(values: Array) -> list[int]:
    """Python's own, which don't overflow."""
    return [int(value) for value in values]
