"""CPU seconds and peak memory of this very process."""

from __future__ import annotations

import time

import pytest

from qtrain.bench import measure
from qtrain.bench.measure import PeakMemory, Stopwatch, memory_field


def test_memory_field_reads_kib() -> None:
    assert memory_field("VmRSS", "Name:\tpython\nVmHWM:\t  2048 kB\nVmRSS:\t  1024 kB\n") == 1 << 20
    with pytest.raises(KeyError, match="VmSwap"):
        memory_field("VmSwap", "VmRSS:\t1 kB\n")


@pytest.mark.parametrize("resettable", [True, False])
def test_peak_counts_what_came_and_went(resettable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not resettable:
        monkeypatch.setattr(measure, "_reset_high_water_mark", lambda: False)
    memory = PeakMemory()
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])  # touch every page
    time.sleep(10 * measure.SAMPLE_SECONDS)  # the sampling fallback has to see it
    del block
    added = memory.added()
    memory.close()
    # 64 MiB, and up to 32 more for the slice above, page tables and what other threads do meanwhile
    assert 60 << 20 <= added <= 96 << 20


def test_peak_forgets_what_was_before() -> None:
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])
    del block
    memory = PeakMemory()
    assert memory.added() < 32 << 20
    memory.close()


def test_stopwatch_tells_work_from_waiting() -> None:
    with Stopwatch() as waiting:
        time.sleep(0.2)
    with Stopwatch() as working:
        end = time.process_time() + 0.1
        while time.process_time() < end:
            pass
    assert waiting.cost.wall_s >= 0.2
    assert waiting.cost.cpu_s < 0.1
    assert working.cost.cpu_s >= 0.1
