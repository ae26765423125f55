"""What all kinds of memory share: the launch that they belong to, masks, and the message of a failure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np

from .address_space import LOW48, AddressSpace, EmulationError
from .counters import Counters
from .floats import Array
from .state import State


@dataclass
class Setup:
    """One batch of CTAs and what its memory needs to know."""

    state: State
    space: AddressSpace
    shared_bytes: int
    local_bytes: int
    counters: Counters
    counting: bool
    racecheck: bool
    # wavefronts by (instruction, addresses, mask), over all batches
    wavefronts: dict[tuple[int, bytes, bytes | None], tuple[int, int, int]] = field(default_factory=dict)


class MemoryBase:
    """One batch's memory."""

    def __init__(self, setup: Setup) -> None:
        self.state, self.space = setup.state, setup.space
        self.counters, self.counting = setup.counters, setup.counting

    def fail(self, index: int, what: str, addresses: Array, bad: Array) -> NoReturn:
        """Report the first bad lane of an access."""
        lane = int(np.flatnonzero(bad)[0])
        address, number = int(addresses[lane]) & LOW48, int(addresses[lane]) >> 48
        region = self.space.numbered(number) if number else None
        belongs = ""
        if region:
            belongs = (
                f"; the pointer belongs to {region.name} [{region.address:#x}, +{region.size} B), "
                f"offset {address - region.address} B"
            )
        raise EmulationError(
            f"{what}: {self.state.where(index, lane)}, address {address:#x}{belongs}; "
            f"{int(np.count_nonzero(bad))} lane(s)"
        )


def simplify(mask: Array | None) -> Array | None:
    """None where all lanes are active."""
    return None if mask is None or mask.all() else mask


def log2(width: int) -> int:
    """Of a power of two."""
    return width.bit_length() - 1
