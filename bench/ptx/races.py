"""Shared-memory hazards between warps with no barrier between them, which lockstep execution can't show."""

from __future__ import annotations

import numpy as np

from .address_space import EmulationError
from .floats import Array
from .state import State

_SEVERAL_READERS = -2
_ATOMIC_WRITER = -3


class Races:
    """For each byte: the last writing and reading warp, and the barrier epoch of each.

    A read of a byte that another warp wrote in the same epoch is reported, and so is a write of one that
    another warp read or wrote.
    """

    def __init__(self, state: State, size: int, bytes_per_cta: int) -> None:
        self.state, self.bytes_per_cta = state, bytes_per_cta
        self.writer, self.reader = np.full(size, -1, np.int32), np.full(size, -1, np.int32)
        self.write_epoch, self.read_epoch = np.full(size, -1, np.int32), np.full(size, -1, np.int32)
        self.write_instruction = np.full(size, -1, np.int32)
        self.epoch: Array = np.zeros(state.lanes, np.int32)

    def barrier(self, mask: Array | None) -> None:
        """These lanes have come to a barrier."""
        self.epoch = self.epoch + (1 if mask is None else mask)

    def _bytes(
        self, offsets: Array, size: int, mask: Array | None, lanes: Array | None
    ) -> tuple[Array, Array, Array, Array]:
        """By byte: its place, the warp, the epoch, the lane."""
        lanes = self.state.lane if lanes is None else lanes
        if mask is not None:
            offsets, lanes = offsets[mask], lanes[mask]
        places = (offsets[:, None] + np.arange(size)).ravel()
        warp = np.repeat(lanes >> 5, size).astype(np.int32)
        return places, warp, np.repeat(self.epoch[lanes], size), np.repeat(lanes, size)

    def read(
        self, index: int, offsets: Array, size: int, mask: Array | None, lanes: Array | None = None
    ) -> None:
        """Check and note a read."""
        at, warp, epoch, lane = self._bytes(offsets, size, mask, lanes)
        bad = (self.write_epoch[at] >= epoch) & (self.writer[at] != warp)
        if bad.any():
            self._fail(index, "read", at, bad, lane)
        fresh = self.read_epoch[at] < epoch
        self.reader[at] = np.where(fresh | (self.reader[at] == warp), warp, _SEVERAL_READERS)
        several = self.reader[at] != warp  # in this very access
        self.reader[at[several]] = _SEVERAL_READERS
        self.read_epoch[at] = epoch

    def write(self, index: int, offsets: Array, size: int, mask: Array | None, atomic: bool = False) -> None:
        """Check and note a write; one instruction may write a byte from several warps."""
        at, warp, epoch, lane = self._bytes(offsets, size, mask, None)
        bad = (self.read_epoch[at] >= epoch) & (self.reader[at] != warp)
        other = (self.writer[at] != warp) & (self.write_instruction[at] != index)
        clash = (self.write_epoch[at] >= epoch) & other
        if atomic:
            clash &= self.writer[at] != _ATOMIC_WRITER
        bad |= clash
        if bad.any():
            self._fail(index, "write", at, bad, lane)
        self.writer[at] = _ATOMIC_WRITER if atomic else warp
        self.write_epoch[at], self.write_instruction[at] = epoch, index

    def landed(self, element: Array, size: int) -> None:
        """Data of cp.async become visible to other warps at the barrier after the wait."""
        at = (element[:, None] * size + np.arange(size)).ravel()
        self.write_epoch[at] = self.epoch[at // self.bytes_per_cta * self.state.threads]

    def _fail(self, index: int, what: str, at: Array, bad: Array, lane: Array) -> None:
        first = int(np.flatnonzero(bad)[0])
        byte = int(at[first])
        raise EmulationError(
            f"shared-memory race (no barrier between): {what} by "
            f"{self.state.where(index, int(lane[first]))}, "
            f"shared byte {byte % self.bytes_per_cta}; last written by warp {int(self.writer[byte])}, "
            f"last read by warp {int(self.reader[byte])} (-2: several)"
        )
