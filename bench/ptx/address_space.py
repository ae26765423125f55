"""The tensors of a launch as global memory: zero-copy, and no address of one is mistaken for another's.

A pointer handed to a kernel is the tensor's real address with the number of its region in bits 48..62. Real
addresses read from memory (tables of pointers) are resolved against all regions.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

import numpy as np

from .floats import Array
from .isa import align

DTYPES: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
LOW48 = (1 << 48) - 1


class EmulationError(Exception):
    """The kernel did something wrong: out of bounds, misaligned, a race, a deadlock."""


class Region:
    """Some bytes of global memory, with views of every width and a note of the sectors touched."""

    def __init__(self, number: int, address: int, size: int, name: str, keep: Any) -> None:
        self.number, self.address, self.size, self.name = number, address, size, name
        self.keep = keep  # alive as long as the region
        self.virtual_base = np.uint64(number << 48 | address)
        self.pad = address & 31  # views start at a whole sector
        length = align(self.pad + size, 32)
        raw: Array = np.zeros(32, np.uint8)
        if size:
            raw = np.ctypeslib.as_array((ctypes.c_uint8 * length).from_address(address - self.pad))
        self.views: dict[int, Array] = {width: raw.view(dtype) for width, dtype in DTYPES.items()}
        self.read = np.zeros(length // 32, bool)
        self.written = np.zeros(length // 32, bool)


def is_tensor(value: Any) -> bool:
    """A torch tensor or a numpy array."""
    return isinstance(value, np.ndarray) or hasattr(value, "data_ptr")


def _span(tensor: Any) -> tuple[int, int]:
    """(address, bytes) with strides included."""
    if isinstance(tensor, np.ndarray):
        address, item = tensor.ctypes.data, tensor.itemsize
        steps = list(tensor.strides)
    else:
        address, item = tensor.data_ptr(), tensor.element_size()
        steps = [stride * item for stride in tensor.stride()]
    if 0 in tensor.shape:
        return address, 0
    return address, sum((size - 1) * step for size, step in zip(tensor.shape, steps, strict=True)) + item


class AddressSpace:
    """All regions of a launch. Tensors that overlap share one."""

    def __init__(self, tensors: Iterable[tuple[str, Any]]) -> None:
        spans = sorted(
            ((*_span(tensor), name, tensor) for name, tensor in tensors), key=lambda span: span[:2]
        )
        merged: list[tuple[int, int, str, list[Any]]] = []
        for address, size, name, tensor in spans:
            if merged and size and address < merged[-1][0] + merged[-1][1]:
                start, length, names, kept = merged.pop()
                merged.append(
                    (start, max(length, address + size - start), f"{names}/{name}", [*kept, tensor])
                )
            else:
                merged.append((address, size, name, [tensor]))
        self.regions = [Region(i, *span) for i, span in enumerate(merged, 1)]

    def virtual_address(self, tensor: Any) -> int:
        """What a kernel gets as the pointer to a tensor."""
        address, size = _span(tensor)
        for region in self.regions:
            inside = region.address <= address < region.address + region.size
            if inside or (region.address == address and size == 0):
                return region.number << 48 | address
        raise KeyError(address)

    def add(self, name: str, array: Array, number: int | None = None) -> None:
        """A further region."""
        number = number or len(self.regions) + 1
        self.regions.append(Region(number, array.ctypes.data, array.nbytes, name, array))

    def numbered(self, number: int) -> Region | None:
        """The region that a pointer claims to belong to."""
        return next((region for region in self.regions if region.number == number), None)

    def containing(self, address: int, size: int) -> Region | None:
        """The region around a real address."""
        return next(
            (r for r in self.regions if r.address <= address and address + size <= r.address + r.size), None
        )
