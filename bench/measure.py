"""What one process costs: CPU seconds over all of its threads, wall seconds, peak resident memory.

Standard library only: this also runs in the peers' environments. Linux (it reads /proc).
"""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): writing 5 sets VmHWM back to the current VmRSS
SAMPLE_SECONDS = 0.005


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds that a block took; `cpu_s` is user + system time of the whole process."""

    cpu_s: float
    wall_s: float


class Stopwatch:
    """`with Stopwatch() as watch: ...`, then `watch.cost`."""

    def __enter__(self) -> Stopwatch:
        self._cpu, self._wall = time.process_time(), time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cost = Cost(time.process_time() - self._cpu, time.perf_counter() - self._wall)


def memory_field(name: str, status: str | None = None) -> int:
    """Bytes of a `VmXXX: n kB` line of /proc/self/status (or of the text given).

    Raises:
        KeyError: there is no such line.
    """
    text = STATUS.read_text() if status is None else status
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    raise KeyError(name)


def release_free_memory(*, collect: bool = True) -> None:
    """Give freed heap back to the system: what a load left behind must not hide what training needs.

    `collect` frees cycles first, which takes a second where large libraries are loaded.
    """
    if collect:
        gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


class PeakMemory:
    """Peak resident memory since construction, above what was resident then.

    The kernel's own high-water mark where it can be reset, otherwise a thread that samples every 5 ms
    and can miss a short peak; `method` says which.
    """

    def __init__(self, *, collect: bool = True) -> None:
        release_free_memory(collect=collect)
        self.baseline = memory_field("VmRSS")
        self.method = "VmHWM" if _reset_high_water_mark() else "sampled"
        self._sampled = self.baseline
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        if self.method == "sampled":
            self._thread.start()

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self._sampled = max(self._sampled, memory_field("VmRSS"))

    def peak(self) -> int:
        """Bytes resident at the highest point so far, the baseline included."""
        if self.method == "VmHWM":
            return memory_field("VmHWM")
        return max(self._sampled, memory_field("VmRSS"))

    def added(self) -> int:
        """Bytes by which the peak so far is above the baseline."""
        return self.peak() - self.baseline

    def close(self) -> None:
        """End the sampling thread, if there is one."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()


def _reset_high_water_mark() -> bool:
    """True when VmHWM now equals VmRSS; some containers forbid it."""
    try:
        CLEAR_REFS.write_text(RESET_PEAK)
    except OSError:
        return False
    status = STATUS.read_text()
    slack = 16 << 20  # both are summed over CPUs with some lag
    return memory_field("VmHWM", status) <= memory_field("VmRSS", status) + slack
