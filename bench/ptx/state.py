"""What generated code asks of the launch: parameters, special registers, the exchange within a warp."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from .address_space import EmulationError
from .floats import Array
from .integers import shfl_source
from .isa import Kernel

Cta = tuple[int, int, int]
_SMS = 128  # as many multiprocessors as %nsmid says
_REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


class State:
    """One batch of CTAs that run together; a lane is a thread of any of them."""

    def __init__(
        self, kernel: Kernel, grid: Cta, ctas: Sequence[Cta], threads: int, params: Mapping[str, bytes]
    ) -> None:
        self.kernel, self.grid, self.ctas, self.threads, self.params = kernel, grid, ctas, threads, params
        self.lanes = threads * len(ctas)
        self.lane = np.arange(self.lanes)
        self.everyone = np.ones(self.lanes, bool)
        self.carry = np.zeros(self.lanes, bool)
        self.exited = np.zeros(self.lanes, bool)
        self.ticks = 0
        self._cache: dict[Hashable, Any] = {}

    def cta_of(self, lane: int) -> Cta:
        """The CTA that a lane belongs to."""
        return self.ctas[lane // self.threads]

    def where(self, index: int, lane: int) -> str:
        """An instruction and a lane, for error messages."""
        place = self.kernel.instrs[index].where()
        return f"{place}: CTA {self.cta_of(lane)}, thread {lane % self.threads}"

    def full(self, value: Any, dtype: Any) -> Array:
        """Broadcast a scalar to all lanes."""
        if isinstance(value, np.ndarray) and value.ndim:
            return value
        key = (np.asarray(value).tobytes(), dtype)
        if key not in self._cache:
            self._cache[key] = np.full(self.lanes, value, dtype)
        array: Array = self._cache[key]
        return array

    def param(self, name: str, offset: int, width: int) -> Array:
        """Bytes of a parameter of the kernel."""
        key = (name, offset, width)
        if key not in self._cache:
            value = np.frombuffer(self.params[name][offset : offset + width], f"u{width}")[0]
            self._cache[key] = np.full(self.lanes, value)
        array: Array = self._cache[key]
        return array

    def special(self, name: str) -> Array:
        """A special register."""
        if name.startswith(("clock", "globaltimer")):
            self.ticks += 32
            return np.full(self.lanes, self.ticks, np.uint32)
        if name not in self._cache:
            self._cache[name] = self._special(name).astype(np.uint32)
        array: Array = self._cache[name]
        return array

    def _special(self, name: str) -> Array:
        base, _, dimension = name.partition(".")
        axis = "xyz".index(dimension) if dimension else 0
        thread = self.lane % self.threads
        if base in ("ctaid", "clusterid"):
            return np.repeat(np.array(self.ctas)[:, axis], self.threads)
        if base == "tid":
            return thread if axis == 0 else thread * 0
        if base in ("laneid", "warpid"):
            return thread % 32 if base == "laneid" else thread // 32
        if base == "smid":
            x, y, z = np.array(self.ctas).T
            return np.repeat((x + self.grid[0] * (y + self.grid[1] * z)) % _SMS, self.threads)
        if base.startswith("lanemask_"):
            return _lane_mask(base[9:], (thread % 32).astype(np.uint64))
        constant = {
            "ntid": self.threads if axis == 0 else 1,
            "nctaid": self.grid[axis],
            "nclusterid": self.grid[axis],
            "nwarpid": self.threads // 32,
            "nsmid": _SMS,
            **dict.fromkeys(("gridid", "cluster_ctaid", "cluster_ctarank"), 0),
            **dict.fromkeys(("cluster_nctaid", "cluster_nctarank"), 1),
        }
        if base not in constant:
            raise NotImplementedError(f"special register %{name}")
        return np.full(self.lanes, constant[base])

    def check_whole_warps(self, mask: Array, index: int) -> None:
        """A warp-synchronous instruction needs every thread of its warp that has not left the kernel."""
        active = mask.reshape(-1, 32)
        present = active | self.exited.reshape(-1, 32)
        if not present[active.any(1)].all():
            place = self.kernel.instrs[index].where()
            raise EmulationError(f"warp-synchronous instruction with part of a warp absent: {place}")

    def shuffle(self, mode: str, b: int, c: int) -> tuple[Array, Array]:
        """(source lanes, predicate) of shfl.sync with constant operands."""
        key = ("shfl", mode, b, c)
        if key not in self._cache:
            self._cache[key] = self.shuffle_by_register(mode, np.int64(b), np.int64(c))
        sources: tuple[Array, Array] = self._cache[key]
        return sources

    def shuffle_by_register(self, mode: str, b: Any, c: Any) -> tuple[Array, Array]:
        """(source lanes, predicate) of shfl.sync."""
        source, inside = shfl_source(self.lane & 31, mode, b.astype(np.int64), c.astype(np.int64))
        return (self.lane & ~31) + source, inside

    def vote(self, mode: str, predicate: Array) -> Array:
        """vote.sync over each warp."""
        warps = predicate.reshape(-1, 32)
        if mode == "ballot":
            return np.repeat(np.packbits(warps, axis=1, bitorder="little").view(np.uint32).ravel(), 32)
        every, some = warps.all(1), warps.any(1)
        return np.repeat({"any": some, "all": every, "uni": every | ~some}[mode], 32)

    def match(self, mode: str, value: Array) -> tuple[Array, Array]:
        """match.sync over each warp: (lanes with an equal value, whether all have it)."""
        equal = value.reshape(-1, 32, 1) == value.reshape(-1, 1, 32)
        lanes = np.packbits(equal, axis=2, bitorder="little").view(np.uint32).ravel()
        everyone = lanes == 0xFFFFFFFF
        return (lanes if mode == "any" else np.where(everyone, lanes, np.uint32(0))), everyone

    def reduce(self, operation: str, value: Array) -> Array:
        """redux.sync over each warp."""
        reduced = _REDUCTIONS[operation].reduce(value.reshape(-1, 32), axis=1, dtype=value.dtype)
        return np.repeat(reduced, 32)

    def trap(self, index: int, mask: Array | None, what: str = "trap") -> None:
        """Fails if any lane comes here."""
        if mask is None or mask.any():
            raise EmulationError(f"{what}: {self.where(index, 0 if mask is None else int(mask.argmax()))}")


def _lane_mask(relation: str, lane: Array) -> Array:
    one = np.uint64(1)
    this, below = one << lane, (one << lane) - one
    masks = {"eq": this, "lt": below, "le": this | below, "gt": ~(this | below), "ge": ~below}
    return masks[relation] & np.uint64(0xFFFFFFFF)
