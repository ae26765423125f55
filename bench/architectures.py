"""What one multiprocessor of an architecture holds, and how many blocks of a kernel fit on it."""

from __future__ import annotations

from dataclasses import dataclass

REGISTERS = 65536
# Registers are given to a warp in pieces of 256, and warps are spread over four sub-cores.
REGISTER_PIECE = 256
SUB_CORES = 4
# The driver's own part of every block's shared memory.
RESERVED_SHARED = 1024


@dataclass(frozen=True, slots=True)
class Architecture:
    """Limits of a compute capability (CUDA programming guide, technical specifications)."""

    name: str
    machine: str
    """As nvdisasm calls it."""
    warps: int
    blocks: int
    shared_bytes: int
    block_shared_bytes: int
    warp_mma: bool
    """Whether Triton's products become instructions of a warp (HMMA), not of a warp group (HGMMA)."""


ARCHITECTURES = {
    80: Architecture("A100", "SM80", 64, 32, 164 * 1024, 163 * 1024, True),
    86: Architecture("RTX 30", "SM86", 48, 16, 100 * 1024, 99 * 1024, True),
    89: Architecture("RTX 40, L40", "SM89", 48, 24, 100 * 1024, 99 * 1024, True),
    90: Architecture("H100", "SM90a", 64, 32, 228 * 1024, 227 * 1024, False),
    120: Architecture("RTX 50", "SM120a", 48, 24, 100 * 1024, 99 * 1024, True),
}


def architecture(arch: int) -> Architecture:
    """Raises ValueError for a compute capability that is not in the table."""
    if arch not in ARCHITECTURES:
        raise ValueError(f"architecture {arch}: there is {', '.join(map(str, ARCHITECTURES))}")
    return ARCHITECTURES[arch]


def blocks_per_sm(arch: int, *, warps: int, registers: int, shared_bytes: int) -> int:
    """Blocks of `warps` warps, `registers` a thread and `shared_bytes` a block that one multiprocessor holds.

    0 when a block needs more than there is.
    """
    limits = architecture(arch)
    if shared_bytes > limits.block_shared_bytes:
        return 0
    warp_registers = -(-registers * 32 // REGISTER_PIECE) * REGISTER_PIECE
    warps_by_registers = REGISTERS // SUB_CORES // max(warp_registers, 1) * SUB_CORES
    spread = -(-warps // SUB_CORES) * SUB_CORES
    return min(
        limits.blocks,
        limits.warps // warps,
        warps_by_registers // spread,
        limits.shared_bytes // (shared_bytes + RESERVED_SHARED),
    )
