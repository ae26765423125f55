"""A bottleneck estimate from counters.

It is a model: each resource alone, perfectly overlapped, with no latency, no cache misses beyond the ideal,
PTX instead of machine instructions and no launch overhead. The true time is at least about the largest term,
and can be several times it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .counters import Counters
from .isa import align


def _ada_tensor_rates() -> dict[tuple[str, str], int]:
    return {
        ("f16", "f16"): 512,
        ("f16", "f32"): 256,
        ("bf16", "f32"): 256,
        ("tf32", "f32"): 128,
        ("e4m3", "f32"): 512,
        ("e5m2", "f32"): 512,
        ("s8", "s32"): 1024,
        ("u8", "s32"): 1024,
        ("f64", "f64"): 2,
    }


@dataclass(frozen=True)
class GPU:
    """Rates of one card; lanes a clock and multiprocessor unless said otherwise. By default an RTX 4090."""

    name: str = "RTX 4090"
    sms: int = 128
    ghz: float = 2.52
    issue: int = 4  # warp-instructions
    fp32: int = 128  # half of them do int32 as well
    int32: int = 64
    half: int = 128
    fp64: int = 2
    mufu: int = 16
    cvt: int = 64  # the CUDA guide's "other conversions"; some forms run at 16
    shfl: int = 32
    dram: float = 1008e9  # bytes a second
    l2: float = 5e12  # bytes a second
    max_threads: int = 1536
    max_ctas: int = 24
    registers: int = 65536
    shared_bytes: int = 100 * 1024
    # dense multiply-adds a clock and multiprocessor, by (element, accumulator)
    mma: Mapping[tuple[str, str], int] = field(default_factory=_ada_tensor_rates)


RTX4090 = GPU()
_RESERVED_SHARED = 1024  # bytes that the driver takes for each CTA


def resource_usage(kernel: Any) -> dict[str, int]:
    """{'reg', 'stack', 'shared', 'local'} of a CompiledKernel, read from its cubin by cuobjdump.

    Raises:
        subprocess.CalledProcessError: cuobjdump failed.
    """
    import triton

    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", printed)
    return {name.lower(): int(value) for name, value in found}


def occupancy(threads: int, shared: int, registers: int, gpu: GPU = RTX4090) -> int:
    """CTAs resident on one multiprocessor; `registers` per thread, 0 if unknown."""
    limits = [gpu.max_ctas, gpu.max_threads // threads, gpu.shared_bytes // (shared + _RESERVED_SHARED)]
    if registers:
        per_warp = align(align(registers, 8) * 32, 256)
        limits.append(gpu.registers // per_warp // (threads // 32))
    return min(limits)


@dataclass(frozen=True)
class Estimate:
    """times: microseconds by resource; bound: the largest; ratios are to its time."""

    gpu: str
    times: Mapping[str, float]
    bound: str
    tensor_ratio: float
    dram_ratio: float
    tflops: float
    resources: Mapping[str, int]
    ctas_per_sm: int
    waves: float

    def __str__(self) -> str:
        times = sorted(self.times.items(), key=lambda entry: -entry[1])
        terms = ", ".join(f"{name} {value:.2f}" for name, value in times if value)
        lines = [
            f"model of {self.gpu} (a lower bound per resource, us): {terms}",
            f"  bound by {self.bound}; tensor time / bound {self.tensor_ratio:.2f}, "
            f"ideal DRAM time / bound {self.dram_ratio:.2f}",
        ]
        if self.tflops:
            lines[-1] += f", at most {self.tflops:.0f} TFLOP/s"
        if self.resources:
            lines.append(
                f"  {self.resources.get('reg')} registers, {self.resources.get('stack', 0)} B stack, "
                f"{self.ctas_per_sm} CTAs/SM, {self.waves:.2f} waves"
            )
        return "\n".join(lines)


def estimate(counters: Counters, gpu: GPU = RTX4090) -> Estimate:
    """What each resource alone would take on the busiest multiprocessor."""
    # CTAs are dealt out evenly
    share = -(-counters.ctas // gpu.sms) / max(1, counters.ctas)

    def microseconds(clocks: float) -> float:
        return clocks * share / (gpu.ghz * 1e9) * 1e6

    def lanes(rate: int, *classes: str) -> float:
        return microseconds(sum(counters.instr.get(name, 0) for name in classes) * 32 / rate)

    issued = sum(count for name, count in counters.instr.items() if name not in ("mov", "param"))
    times = {
        "issue": microseconds(issued / gpu.issue),
        "fp32": lanes(gpu.fp32, "fp32"),
        "int32": lanes(gpu.int32, "int", "imul"),
        "fp32+int32": lanes(gpu.fp32, "fp32", "int", "imul"),
        "half": lanes(gpu.half, "half"),
        "fp64": lanes(gpu.fp64, "fp64"),
        "mufu": lanes(gpu.mufu, "mufu"),
        "cvt": lanes(gpu.cvt, "cvt"),
        "shfl": lanes(gpu.shfl, "shfl", "vote"),
        "tensor": microseconds(_tensor_clocks(counters, gpu)),
        "shared": microseconds(sum(kind["wavefronts"] for kind in counters.smem.values())),
        "L2": sum(kind["sectors"] for kind in counters.gmem.values()) * 32 / gpu.l2 * 1e6,
        "DRAM": (counters.unique_read + counters.unique_write) / gpu.dram * 1e6,
    }
    bound = max(times, key=lambda name: times[name])
    longest = times[bound] or 1e-9
    resources = resource_usage(counters.kernel) if counters.kernel is not None else {}
    resident = occupancy(counters.threads, counters.shared_bytes, resources.get("reg", 0), gpu)
    return Estimate(
        gpu=gpu.name,
        times=times,
        bound=bound,
        tensor_ratio=times["tensor"] / longest,
        dram_ratio=times["DRAM"] / longest,
        tflops=counters.flops / longest / 1e6,
        resources=resources,
        ctas_per_sm=resident,
        waves=counters.ctas / gpu.sms / max(1, resident),
    )


def _tensor_clocks(counters: Counters, gpu: GPU) -> float:
    clocks = 0.0
    for name, flops in counters.mma_flops.items():
        parts = name.split(".")
        element, accumulator = parts[-2], "s32" if "s32" in parts else parts[-1]
        clocks += flops / 2 / gpu.mma.get((element, accumulator), 256)
    return clocks
