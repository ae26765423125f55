"""Loads and stores of global memory: bounds, alignment and the count of sectors."""

from __future__ import annotations

import numpy as np

from .address_space import DTYPES, Region
from .counters import sectors
from .floats import Array
from .memory_base import MemoryBase, Setup, log2, simplify


class GlobalMemory(MemoryBase):
    """Accesses of `count` elements of `width` bytes a lane."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._last_region: dict[int, Region] = {}  # by instruction

    def load_global(
        self, index: int, addresses: Array, width: int, count: int, mask: Array | None, kind: str = "load"
    ) -> list[Array]:
        """`count` arrays; what inactive lanes get is undefined."""
        if mask is not None and not mask.any():
            return [np.zeros(len(addresses), DTYPES[width])] * count
        mask = simplify(mask)
        size = width * count
        located = self._locate(index, addresses, size, mask)
        if located is None:
            loaded = [np.zeros(len(addresses), DTYPES[width]) for _ in range(count)]
            for region, lanes, pointers in self._split(index, addresses, size, mask):
                self._last_region[index] = region
                for into, values in zip(
                    loaded, self.load_global(index, pointers, width, count, lanes, kind), strict=True
                ):
                    into[lanes] = values[lanes]
            return loaded
        region, offsets = located
        self._count_global(index, kind, addresses, size, mask)
        self._touch(region.read, offsets, mask)
        element = (offsets >> np.uint64(log2(size))).view(np.int64)
        if count == 1:
            return [region.views[width].take(element)]
        vectors = region.views[width].reshape(-1, count).take(element, axis=0)
        return list(np.ascontiguousarray(vectors.T))

    def store_global(
        self, index: int, addresses: Array, width: int, values: list[Array], mask: Array | None
    ) -> None:
        """Store one array for each element of the vector."""
        if mask is not None and not mask.any():
            return
        mask = simplify(mask)
        size = width * len(values)
        located = self._locate(index, addresses, size, mask)
        if located is None:
            for region, lanes, pointers in self._split(index, addresses, size, mask):
                self._last_region[index] = region
                self.store_global(index, pointers, width, values, lanes)
            return
        region, offsets = located
        self._count_global(index, "store", addresses, size, mask)
        self._touch(region.written, offsets, mask)
        write(region.views[width], (offsets >> np.uint64(log2(size))).view(np.int64), values, mask)

    def _locate(
        self, index: int, addresses: Array, size: int, mask: Array | None
    ) -> tuple[Region, Array] | None:
        """(region, byte offsets in its views) if all active lanes fall into one region, else None."""
        region = self._last_region.get(index)
        found = self._offsets(index, region, addresses, size, mask) if region else None
        if found is None:
            first = int(addresses[0] if mask is None else addresses[mask.argmax()]) >> 48
            region = self.space.numbered(first)
            found = self._offsets(index, region, addresses, size, mask) if region else None
        if region is None or found is None:
            return None
        self._last_region[index] = region
        return region, found

    def _offsets(
        self, index: int, region: Region, addresses: Array, size: int, mask: Array | None
    ) -> Array | None:
        offsets = addresses - region.virtual_base
        if mask is not None:
            offsets *= mask
        if int(offsets.max()) + size > region.size:
            return None
        if region.pad:
            offsets += np.uint64(region.pad)
        if size > 1 and int(np.bitwise_or.reduce(offsets)) & (size - 1):
            bad = (offsets & np.uint64(size - 1)) != 0
            if mask is not None:
                bad &= mask
            if bad.any():
                self.fail(index, f"misaligned {size}-byte access", addresses, bad)
        return offsets

    def _split(
        self, index: int, addresses: Array, size: int, mask: Array | None
    ) -> list[tuple[Region, Array, Array]]:
        """[(region, its lanes, pointers)] of an access that does not fall into one region."""
        pointers = addresses.copy()
        active = np.ones(len(pointers), bool) if mask is None else mask
        for lane in np.flatnonzero(active & (pointers >> np.uint64(48) == 0)):
            region = self.space.containing(int(pointers[lane]), size)
            if region is not None:
                pointers[lane] = region.number << 48 | int(pointers[lane])
        number = pointers >> np.uint64(48)
        parts, seen = [], np.zeros(len(pointers), bool)
        for region in self.space.regions:
            lanes = active & (number == region.number)
            if lanes.any():
                offsets = pointers - region.virtual_base
                limit = np.uint64(region.size)
                bad = lanes & ((offsets > limit) | (offsets + np.uint64(size) > limit))
                if bad.any():
                    self.fail(index, f"out-of-bounds {size}-byte access", pointers, bad)
                parts.append((region, lanes, pointers))
            seen |= lanes
        if (active & ~seen).any():
            self.fail(index, f"{size}-byte access through an invalid pointer", pointers, active & ~seen)
        return parts

    def _count_global(self, index: int, kind: str, addresses: Array, size: int, mask: Array | None) -> None:
        if not self.counting:
            return
        requests, touched = sectors(addresses, mask)
        lanes = len(addresses) if mask is None else int(np.count_nonzero(mask))
        for counts in (self.counters.gmem[kind], self.counters.sites[index]):
            counts["requests"] += requests
            counts["sectors"] += touched
            counts["bytes"] += size * lanes

    def _touch(self, seen: Array, offsets: Array, mask: Array | None) -> None:
        if self.counting:
            sector = offsets >> np.uint64(5)
            seen[sector if mask is None else sector[mask]] = True

    def update_global(
        self, index: int, addresses: Array, width: int, mask: Array | None
    ) -> list[tuple[Array, Array, Array]]:
        """Check and count an atomic; returns [(view, element of every lane, lanes)]."""
        parts = []
        for region, lanes, pointers in self._split(index, addresses, width, mask):
            offsets = pointers - region.virtual_base + np.uint64(region.pad)
            misaligned = lanes & ((offsets & np.uint64(width - 1)) != 0)
            if misaligned.any():
                self.fail(index, "misaligned atomic", addresses, misaligned)
            self._count_global(index, "atom", pointers, width, lanes)
            self._touch(region.read, offsets, lanes)
            self._touch(region.written, offsets, lanes)
            parts.append((region.views[width], offsets.view(np.int64) >> log2(width), lanes))
        return parts


def write(view: Array, element: Array, values: list[Array], mask: Array | None) -> None:
    """Write vectors of elements into a flat view; `element` counts vectors."""
    data = values[0] if len(values) == 1 else np.stack(values, 1)
    target = view if len(values) == 1 else view.reshape(-1, len(values))
    if mask is not None:
        element, data = element[mask], data[mask]
    target[element] = data
