"""Seconds and bytes of a callable, on CUDA by events and the allocator, on a CPU by the clock and /proc."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Protocol, TypeVar

import torch

from qtrain.kernels.choice import HAS_TRITON

from .measure import PeakMemory

CPU_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
FLUSH_FACTOR = 2  # the buffer that is written against the last cache's size
FLUSH_LEAST = 64 << 20  # bytes

OK = "ok"
OUT_OF_MEMORY = "out of memory"
PEAKS = 3  # of resident memory: the allocator's habits differ from call to call
# What libraries raise when they can't do a shape, a dtype or a device. Errors of torch.compile are of the
# first kind, a C compiler's are of the last two.
FAILURES: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ImportError,
    AssertionError,
    subprocess.SubprocessError,
    OSError,
)
if HAS_TRITON:
    from triton.errors import TritonError

    FAILURES += (TritonError,)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Plan:
    """How a case is sampled; `budget_s` bounds a variant's time, which matters on a CPU only."""

    least: int
    most: int
    warm_up: int
    budget_s: float
    cold: bool
    seed: int


@dataclass(frozen=True, slots=True)
class Timed:
    """`run(prepare())` is one sample, of which `run` alone is timed."""

    prepare: Callable[[], Any]
    run: Callable[[Any], Any]


class Device(Protocol):
    """What a sample needs of a device."""

    def seconds(self, timed: Timed, *, cold: bool) -> float:
        """Of one sample."""

    def peak_bytes(self, timed: Timed) -> int:
        """Of one sample, above what was there after `prepare`; the result is counted."""


class Cpu:
    """Seconds of all of the process' threads, or of the wall clock.

    On cores that other processes use as well, wall-clock time mostly measures those: each of an op's
    parallel regions waits for the last thread to be scheduled. The cache is cold after a buffer of twice its
    size was written.
    """

    def __init__(self, *, wall: bool) -> None:
        self._clock = time.perf_counter if wall else time.process_time
        self._buffer = torch.zeros(max(FLUSH_LEAST, FLUSH_FACTOR * cpu_cache_bytes()), dtype=torch.uint8)

    def seconds(self, timed: Timed, *, cold: bool) -> float:
        """Of one sample."""
        prepared = timed.prepare()
        if cold:
            self._buffer.add_(1)
        start = self._clock()
        result = timed.run(prepared)
        elapsed = self._clock() - start
        del result
        return elapsed

    def peak_bytes(self, timed: Timed) -> int:
        """Growth of the resident memory of the process at its highest; the median of a few."""
        return int(median(self._added(timed) for _ in range(PEAKS)))

    def _added(self, timed: Timed) -> int:
        prepared = timed.prepare()
        memory = PeakMemory(collect=False)  # tensors are freed when they are let go
        result = timed.run(prepared)
        memory.close()
        del result
        return memory.added()


class Cuda:
    """Seconds between two events; the L2 cache is cold after a buffer of twice its size was written.

    The write is still running when the sample's launches are queued: what the host needs for the first of
    them is hidden, as it is in training, where the device is behind the host.
    """

    def __init__(self) -> None:
        size = max(FLUSH_LEAST, FLUSH_FACTOR * torch.cuda.get_device_properties().L2_cache_size)
        self._buffer = torch.zeros(size, dtype=torch.uint8, device="cuda")

    def seconds(self, timed: Timed, *, cold: bool) -> float:
        """Of one sample."""
        prepared = timed.prepare()
        start, end = _event(), _event()
        torch.cuda.synchronize()
        if cold:
            self._buffer.zero_()
        start.record()
        result = timed.run(prepared)
        end.record()
        end.synchronize()
        del result
        return float(start.elapsed_time(end)) / 1e3

    def peak_bytes(self, timed: Timed) -> int:
        """Of PyTorch's allocator."""
        prepared = timed.prepare()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = timed.run(prepared)
        torch.cuda.synchronize()
        del result
        return int(torch.cuda.max_memory_allocated()) - before


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


@dataclass
class Samples:
    """What one variant gave: seconds, or why it ended."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    status: str = OK


def attempt(action: Callable[[], T]) -> tuple[T | None, str]:
    """(result, `ok`), or (None, the failure in one line): one variant's failure is a row, not the end."""
    try:
        return action(), OK
    except torch.OutOfMemoryError:
        status = OUT_OF_MEMORY
    except FAILURES as error:
        refused = "can't allocate memory" in str(error)  # what the CPU's allocator says
        lines = str(error).strip().splitlines() or [""]
        status = OUT_OF_MEMORY if refused else f"failed: {type(error).__name__}: {lines[0][:200]}"
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None, status


def sample(device: Device, variants: Mapping[str, Timed], plan: Plan) -> dict[str, Samples]:
    """Rounds in which every variant has one sample, in an order drawn anew for each.

    A variant that fails ends with its status and no samples, the others go on. There are `plan.most` rounds,
    or on a slow device fewer, but at least `plan.least`.
    """
    found = {name: Samples() for name in variants}
    seconds: dict[str, Callable[[], float]] = {
        name: partial(device.seconds, timed, cold=plan.cold) for name, timed in variants.items()
    }
    for name, timed in variants.items():
        for _ in range(plan.warm_up):
            _one(found[name], seconds[name])
        found[name].peak_bytes = _one(found[name], partial(device.peak_bytes, timed))
    draw = random.Random(plan.seed)
    start = time.perf_counter()
    for turn in range(plan.most):
        alive = [name for name in variants if found[name].status == OK]
        if turn >= plan.least and time.perf_counter() - start > plan.budget_s * len(alive):
            break
        for name in draw.sample(alive, len(alive)):
            elapsed = _one(found[name], seconds[name])
            if elapsed is not None:
                found[name].seconds.append(elapsed)
    for samples in found.values():
        if samples.status != OK:
            samples.seconds.clear()
    return found


def _one(samples: Samples, action: Callable[[], T]) -> T | None:
    """The action's result; nothing, once the variant has failed."""
    if samples.status != OK:
        return None
    result, samples.status = attempt(action)
    return result


def make_device(name: str, *, wall: bool = False) -> Device:
    """Of `cpu` or `cuda`; `wall` is the CPU's clock."""
    return Cuda() if name == "cuda" else Cpu(wall=wall)


def cpu_cache_bytes() -> int:
    """Size of the last-level cache that the first core sees; 0 where the system does not say."""
    text = CPU_CACHE.read_text().strip() if CPU_CACHE.is_file() else "0K"
    return int(text.removesuffix("K")) * 1024
