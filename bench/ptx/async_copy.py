"""cp.async: what is copied is NaN until the thread's own wait covers it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .floats import Array
from .global_memory import GlobalMemory
from .memory_base import Setup, log2, simplify
from .shared_memory import SharedMemory


@dataclass
class _Copy:
    """A copy in flight."""

    group: int | Array  # one for all lanes, or one for each
    lanes: Array | None  # None: all
    target: Array  # index of the vector of `size` bytes in shared memory
    data: Array
    size: int


class AsyncCopies(GlobalMemory, SharedMemory):
    """Global to shared, by groups."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._in_flight: list[_Copy] = []
        self._group: Array = np.zeros(setup.state.lanes, np.int32)  # groups committed so far, by lane

    def copy_async(
        self, index: int, target: Array, source: Array, size: int, given: Any, mask: Array | None
    ) -> None:
        """`given`: None for all of `size`, or how many bytes are read, the rest being zero."""
        if mask is not None and not mask.any():
            return
        mask = simplify(mask)
        offsets = self.shared_offsets(index, target, size, mask)
        self.count_shared("cp.async", index, target, size, mask)
        if self.races:
            self.races.write(index, offsets, size, mask)
        data = self._read(index, source, size, given, mask)
        element = offsets >> log2(size)
        lanes = None
        if mask is not None:
            element, data, lanes = element[mask], data[mask], np.flatnonzero(mask)
        self.shared[4].reshape(-1, size // 4)[element] = np.uint32(0xFFFFFFFF)
        first = int(self._group[0])
        group: int | Array = self._group if lanes is None else self._group[lanes]
        if bool((self._group == first).all()):
            group = first
        self._in_flight.append(_Copy(group, lanes, element, data, size))

    def _read(self, index: int, source: Array, size: int, given: Any, mask: Array | None) -> Array:
        """[lanes, words]"""
        if given is None:
            return np.stack(self.load_global(index, source, 4, size // 4, mask, "cp.async"), 1)
        count = np.broadcast_to(np.asarray(given, np.uint32), (len(source),))
        whole = count >= size
        partial = (count > 0) & ~whole
        if mask is not None:
            whole, partial = whole & mask, partial & mask
        data = np.stack(self.load_global(index, source, 4, size // 4, whole, "cp.async"), 1)
        data = data * whole[:, None]
        if partial.any():
            bytes_ = np.ascontiguousarray(data).view(np.uint8).reshape(len(source), size)
            for k in range(size):
                lanes = partial & (count > k)
                if lanes.any():
                    byte = self.load_global(index, source + np.uint64(k), 1, 1, lanes, "cp.async")[0]
                    bytes_[lanes, k] = byte[lanes]
            data = bytes_.view(np.uint32)
        return data

    def commit_group(self, mask: Array | None) -> None:
        """cp.async.commit_group"""
        self._group = self._group + (1 if mask is None else mask)

    def wait_group(self, pending: int | None, mask: Array | None) -> None:
        """Land the copies of all but the latest `pending` groups; None: everything, committed or not."""
        if not self._in_flight:
            return
        first = int(self._group[0])
        uniform = mask is None and bool((self._group == first).all())
        left = []
        for copy in self._in_flight:
            if uniform and isinstance(copy.group, int):
                if pending is None or copy.group < first - pending:
                    self._land(copy.target, copy.data, copy.size)
                else:
                    left.append(copy)
            else:
                left += self._wait_by_lane(copy, pending, mask)
        self._in_flight = left

    def _wait_by_lane(self, copy: _Copy, pending: int | None, mask: Array | None) -> list[_Copy]:
        lanes = self.state.lane if copy.lanes is None else copy.lanes
        group = np.broadcast_to(np.asarray(copy.group), lanes.shape)
        done = np.ones(lanes.shape, bool) if pending is None else group < self._group[lanes] - pending
        if mask is not None:
            done &= mask[lanes]
        self._land(copy.target[done], copy.data[done], copy.size)
        if done.all():
            return []
        kept = ~done
        return [_Copy(group[kept], lanes[kept], copy.target[kept], copy.data[kept], copy.size)]

    def _land(self, target: Array, data: Array, size: int) -> None:
        self.shared[4].reshape(-1, size // 4)[target] = data
        if self.races:
            self.races.landed(target, size)
