"""All memory as the generated code sees it: global, shared and local, and atomics."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .address_space import DTYPES
from .async_copy import AsyncCopies
from .floats import Array
from .isa import align
from .memory_base import Setup, log2


class Memory(AsyncCopies):
    """Of one batch of CTAs."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._local_bytes = align(setup.local_bytes, 8)
        memory = np.full(setup.state.lanes * self._local_bytes, 0xFF, np.uint8)
        self._local: dict[int, Array] = {width: memory.view(dtype) for width, dtype in DTYPES.items()}
        self._local_base = setup.state.lane * self._local_bytes

    def _local_offsets(self, index: int, addresses: Array, size: int, mask: Array | None) -> Array:
        offsets = addresses.astype(np.int64)
        if mask is not None:
            offsets = offsets * mask
        if int(offsets.max()) + size > self._local_bytes:
            self.fail(index, "out-of-bounds local access", addresses, offsets + size > self._local_bytes)
        return offsets + self._local_base

    def load_local(
        self, index: int, addresses: Array, width: int, count: int, mask: Array | None
    ) -> list[Array]:
        """`count` arrays; what inactive lanes get is undefined."""
        first = self._local_offsets(index, addresses, width * count, mask) >> log2(width)
        return [self._local[width].take(first + i) for i in range(count)]

    def store_local(
        self, index: int, addresses: Array, width: int, values: list[Array], mask: Array | None
    ) -> None:
        """Store one array for each element of the vector."""
        first = self._local_offsets(index, addresses, width * len(values), mask) >> log2(width)
        for i, value in enumerate(values):
            if mask is None:
                self._local[width][first + i] = value
            else:
                self._local[width][(first + i)[mask]] = value[mask]

    def atomic(
        self,
        index: int,
        space: str,
        addresses: Array,
        width: int,
        update: Callable[..., Array],
        values: list[Array],
        mask: Array | None,
    ) -> Array:
        """Read-modify-write, in the order of the lanes where they collide; returns the old values.

        update(old, *values) -> new.
        """
        old = np.zeros(len(addresses), DTYPES[width])
        if mask is not None and not mask.any():
            return old
        if space == "global":
            parts = self.update_global(index, addresses, width, mask)
        else:
            offsets = self.shared_offsets(index, addresses, width, mask)
            self.count_shared("atom", index, addresses, width, mask)
            if self.races:
                self.races.write(index, offsets, width, mask, atomic=True)
            active = self.state.everyone if mask is None else mask
            parts = [(self.shared[width], offsets >> log2(width), active)]
        for view, element, active in parts:
            lanes = np.flatnonzero(active)
            targets = element[lanes]
            while len(lanes):  # one lane of each address at a time
                first = np.unique(targets, return_index=True)[1]
                if len(first) == len(targets):
                    first = np.arange(len(targets))
                now, where = lanes[first], targets[first]
                old[now] = view[where]
                view[where] = update(view[where], *[value[now] for value in values])
                left = np.ones(len(targets), bool)
                left[first] = False
                lanes, targets = lanes[left], targets[left]
        return old
