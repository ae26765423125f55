"""Run the PTX that Triton emits on the CPU: what a kernel computes as compiled, and what it did.

A functional emulator of the PTX of Triton 3.6 to 3.9 for sm_80, sm_86 and sm_89, in Python and numpy, with
no GPU, driver or CUDA toolkit. Unlike Triton's interpreter it sees the compiled kernel: the software
pipeline, layouts of shared memory, cp.async, ldmatrix, mma.sync, inline assembly.

    counters = launch(kernel, grid, *args, num_warps=4, num_stages=3, BLOCK=128)    # in place on the tensors
    print(counters, estimate(counters), counters.hot("wavefronts"), sep="\\n")

    with patched(log=(log := []), racecheck=True):    # any kernel[grid](...) on CPU tensors, autotuned too
        op(x, w)                                      # log: [(kernel name, Counters), ...]

    run(ptx_text, grid, args, num_warps=4, shared=32768)    # or a CompiledKernel, from compile_for(...)

`edit=function` of all three is applied to the PTX text before it runs: for showing that a test would notice
a wait, a mask or a rescaling that is missing.

What it catches: accesses of global memory outside the tensors passed in, even where they land in another one
(the error names instruction, source line, CTA, thread, address and tensor); misalignment; registers and
shared memory that were never written (they start as NaN patterns); data of cp.async that the thread's own
wait_group does not cover yet (NaN); warp-synchronous instructions in divergent warps; a failed
device_assert; threads stuck at a barrier (an endless loop with `max_steps`); unknown instructions. A missing
bar.sync is not seen by lockstep execution: `racecheck=True` reports conflicting accesses of shared memory by
two warps in one barrier interval, two to three times slower.

Counters: `instr`, warp-instructions by class (64-bit integer operations and IEEE divisions weighted by
roughly what they expand to); `mma`, `flops`; `gmem[load | store | cp.async | atom]`, requests, bytes and
32-byte sectors by warp access; `unique_read`, `unique_write`, distinct sectors over the launch: the ideal
DRAM traffic; `smem[load | store | ldmatrix | cp.async | atom]`, requests, wavefronts and conflict-free
wavefronts; `barriers`, `local_bytes`, and `sites` by instruction. `estimate` is a model, a lower bound for
comparing variants, no prediction: see `model`.

Limits:
- Not bit-exact: fma goes by way of float64 (a double rounding about once in 2^29), mma sums in fp32 in the
  order of BLAS (the hardware truncates; tf32 inputs are truncated to 10 bits of mantissa), approximate
  functions are correctly computed ones, min and max ignore the sign of zero.
- Memory is sequentially consistent and fences do nothing; a CTA's warps advance together, so races beyond
  `racecheck` are not explored. Atomics act in the order of the lanes. CTAs of a batch interleave by basic
  block; locks between CTAs work.
- No recursive calls (noinline functions are expanded in place), named or partial barriers, TMA, wgmma or
  clusters (sm_90), stmatrix, sub-byte mma, vector atomics, packed 16-bit integers. device_print is ignored,
  generic addresses are taken as global. The program is one PTX entry.
- Illegal PTX is not always refused: ptxas decides that. An autotuned kernel runs one configuration.

Of the modules, `lexer` and `parser` make a Kernel (`isa`) of the text; `blocks` and `classify` analyse it;
`emitter` and `emit_*` write numpy code, with the arithmetic of `floats`, `integers` and `matrix`; `program`
compiles it. `executor` is the control flow, `state` the registers and the exchange within warps, `memory`
all memory, `races` the racecheck. `counters`, `model` and `launch` are what their names say.
"""

from .address_space import EmulationError
from .counters import Counters
from .executor import run
from .launch import compile_for, launch, patched
from .model import GPU, RTX4090, Estimate, estimate, occupancy, resource_usage

__all__ = [
    "GPU",
    "RTX4090",
    "Counters",
    "EmulationError",
    "Estimate",
    "compile_for",
    "estimate",
    "launch",
    "occupancy",
    "patched",
    "resource_usage",
    "run",
]
