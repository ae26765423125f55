"""Shared memory: bounds, alignment, bank conflicts, ldmatrix."""

from __future__ import annotations

from typing import Any

import numpy as np

from .address_space import DTYPES
from .counters import wavefronts
from .floats import Array
from .global_memory import write
from .isa import align
from .memory_base import MemoryBase, Setup, log2, simplify
from .races import Races

_CACHE_LIMIT = 4096  # addresses that depend on data would fill it


class SharedMemory(MemoryBase):
    """That of all CTAs of a batch, one after the other; it starts as NaN patterns."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        state = setup.state
        self.shared_limit = setup.shared_bytes
        stride = align(max(setup.shared_bytes, 1), 128)
        memory = np.full(len(state.ctas) * stride, 0xFF, np.uint8)
        self.shared: dict[int, Array] = {width: memory.view(dtype) for width, dtype in DTYPES.items()}
        # [lanes], where each lane's CTA starts
        self._base = state.lane // state.threads * stride if len(state.ctas) > 1 else None
        self._wavefronts = setup.wavefronts
        self.races = Races(state, len(memory), stride) if setup.racecheck else None

    def shared_offsets(self, index: int, addresses: Array, size: int, mask: Array | None) -> Array:
        """Checked byte offsets within the whole batch."""
        active: Array = addresses if mask is None else addresses * mask
        if int(active.max()) + size > self.shared_limit:
            bad = active.astype(np.int64) + size > self.shared_limit
            what = f"out-of-bounds {size}-byte shared access (shared memory is {self.shared_limit} B)"
            self.fail(index, what, addresses, bad if mask is None else bad & mask)
        if size > 1 and int(np.bitwise_or.reduce(active)) & (size - 1):
            bad = (active & active.dtype.type(size - 1)) != 0
            self.fail(index, f"misaligned {size}-byte shared access", addresses, bad)
        offsets = active.astype(np.int64)
        return offsets if self._base is None else offsets + self._base

    def count_shared(self, kind: str, index: int, addresses: Array, size: int, mask: Array | None) -> None:
        """Count an access of `size` bytes a lane."""
        if self.counting:
            key = (index, addresses.tobytes(), None if mask is None else mask.tobytes())
            if key not in self._wavefronts:
                self._wavefronts[key] = wavefronts(addresses, size, mask)
            self._add(kind, index, self._wavefronts[key])

    def _add(self, kind: str, index: int, counted: tuple[int, int, int]) -> None:
        if len(self._wavefronts) > _CACHE_LIMIT:
            self._wavefronts.clear()
        for counts in (self.counters.smem[kind], self.counters.sites[index]):
            counts["requests"] += counted[0]
            counts["wavefronts"] += counted[1]
            counts["ideal"] += counted[2]

    def load_shared(
        self, index: int, addresses: Array, width: int, count: int, mask: Array | None
    ) -> list[Array]:
        """`count` arrays; what inactive lanes get is undefined."""
        if mask is not None and not mask.any():
            return [np.zeros(len(addresses), DTYPES[width])] * count
        mask = simplify(mask)
        size = width * count
        offsets = self.shared_offsets(index, addresses, size, mask)
        self.count_shared("load", index, addresses, size, mask)
        if self.races:
            self.races.read(index, offsets, size, mask)
        if count == 1:
            return [self.shared[width].take(offsets >> log2(width))]
        vectors = self.shared[width].reshape(-1, count).take(offsets >> log2(size), axis=0)
        return list(np.ascontiguousarray(vectors.T))

    def store_shared(
        self, index: int, addresses: Array, width: int, values: list[Array], mask: Array | None
    ) -> None:
        """Store one array for each element of the vector."""
        if mask is not None and not mask.any():
            return
        mask = simplify(mask)
        size = width * len(values)
        offsets = self.shared_offsets(index, addresses, size, mask)
        self.count_shared("store", index, addresses, size, mask)
        if self.races:
            self.races.write(index, offsets, size, mask)
        write(self.shared[width], offsets >> log2(size), values, mask)

    def load_matrix(
        self, index: int, addresses: Array, count: int, transposed: bool, mask: Array | None
    ) -> list[Array]:
        """ldmatrix: rows of 16 bytes at the addresses of lanes 0 .. 8 count - 1 of each (whole) warp."""
        if mask is not None:
            addresses = addresses * mask
        suppliers = self.state.lane.reshape(-1, 32)[:, : 8 * count].ravel()
        rows = np.ascontiguousarray(addresses[suppliers])
        if int(rows.max()) + 16 > self.shared_limit:
            what = f"out-of-bounds ldmatrix (shared memory is {self.shared_limit} B)"
            self.fail(
                index, what, addresses, self._of(suppliers, rows.astype(np.int64) + 16 > self.shared_limit)
            )
        if int(np.bitwise_or.reduce(rows)) & 15:
            self.fail(index, "misaligned ldmatrix row", addresses, self._of(suppliers, (rows & 15) != 0))
        offsets = rows.astype(np.int64)
        if self._base is not None:
            offsets += self._base[suppliers]
        active = None if mask is None else mask[suppliers]
        self._count_matrix(index, rows, count, active)
        if self.races:
            self.races.read(index, offsets, 16, active, suppliers)
        # [warp, matrix, row, word]
        matrices: Array = self.shared[4].reshape(-1, 4).take(offsets >> 4, axis=0).reshape(-1, count, 8, 4)
        if transposed:
            turned = matrices.view(np.uint16).transpose(0, 1, 3, 2)
            matrices = np.ascontiguousarray(turned).view(np.uint32)
        return list(np.ascontiguousarray(matrices.transpose(1, 0, 2, 3)).reshape(count, -1))

    def _of(self, lanes: Array, bad: Array) -> Array:
        every = np.zeros(self.state.lanes, bool)
        every[lanes] = bad
        return every

    def _count_matrix(self, index: int, rows: Array, count: int, active: Array | None) -> None:
        if not self.counting:
            return
        key = (index, rows.tobytes(), None if active is None else active.tobytes())
        if key not in self._wavefronts:
            live: Any = np.ones(len(rows), bool) if active is None else active
            _, needed, ideal = wavefronts(rows, 16, live)
            self._wavefronts[key] = (int(live.sum()) // (8 * count), needed, ideal)
        self._add("ldmatrix", index, self._wavefronts[key])
