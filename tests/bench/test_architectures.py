"""Occupancy, against figures of NVIDIA's occupancy calculator."""

from __future__ import annotations

import pytest

from qtrain.bench.architectures import blocks_per_sm


@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared", "blocks"),
    [
        (80, 8, 32, 0, 8),  # all 64 warps
        (86, 8, 32, 0, 6),  # all 48 warps
        (86, 1, 16, 0, 16),  # 16 blocks
        (89, 1, 16, 0, 24),  # 24 blocks
        (120, 1, 16, 0, 24),
        (90, 1, 16, 0, 32),
        (89, 8, 143, 65536, 1),  # shared memory
        (89, 8, 128, 0, 2),  # 128 x 256 x 2 = 65536 registers
        (89, 8, 129, 0, 1),  # 136 a thread after rounding
        (89, 4, 168, 0, 3),  # three warps in each sub-core
        (89, 6, 80, 0, 3),  # six warps take as much as eight: six fit in a sub-core, 24 in all
        (89, 4, 162, 36864, 2),
        (80, 8, 200, 166912, 1),
        (80, 8, 200, 166913, 0),  # more than a block may have
        (89, 32, 255, 0, 0),  # more registers than there are
    ],
)
def test_blocks_per_multiprocessor(arch: int, warps: int, registers: int, shared: int, blocks: int) -> None:
    assert blocks_per_sm(arch, warps=warps, registers=registers, shared_bytes=shared) == blocks


def test_unknown_architecture() -> None:
    with pytest.raises(ValueError, match="architecture 70: there is 80, 86"):
        blocks_per_sm(70, warps=4, registers=32, shared_bytes=0)
