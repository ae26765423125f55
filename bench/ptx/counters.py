"""What one launch did, and how much of it: sectors of global memory, wavefronts of shared memory."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .floats import Array
from .isa import Kernel


def _by_name() -> defaultdict[str, Counter[str]]:
    return defaultdict(Counter)


def _by_instruction() -> defaultdict[int, Counter[str]]:
    return defaultdict(Counter)


@dataclass
class Counters:
    """Dynamic counts of one launch; see the package's documentation.

    instr: warp-instructions by class, weighted; mma and mma_flops by shape and types. gmem by kind of access
    (load, store, cp.async, atom): requests, bytes, sectors. smem (load, store, ldmatrix, cp.async, atom):
    requests, wavefronts, ideal wavefronts. sites: the same by index of the instruction. unique_read and
    unique_write: bytes of the distinct 32-byte sectors.
    """

    instr: Counter[str] = field(default_factory=Counter)
    mma: Counter[str] = field(default_factory=Counter)
    mma_flops: Counter[str] = field(default_factory=Counter)
    gmem: defaultdict[str, Counter[str]] = field(default_factory=_by_name)
    smem: defaultdict[str, Counter[str]] = field(default_factory=_by_name)
    sites: defaultdict[int, Counter[str]] = field(default_factory=_by_instruction)
    unique_read: int = 0
    unique_write: int = 0
    barriers: int = 0
    local_bytes: int = 0  # per thread
    ctas: int = 0
    threads: int = 0  # per CTA
    shared_bytes: int = 0  # per CTA
    warp_instructions: int = 0  # unweighted
    seconds: float = 0.0  # that the emulation took
    batches: int = 0
    parsed: Kernel | None = None
    kernel: Any = None  # Triton's CompiledKernel, where there is one

    @property
    def flops(self) -> int:
        """Of the tensor cores, two for each multiply-add."""
        return sum(self.mma_flops.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "ctas": self.ctas,
            "threads": self.threads,
            "instr": dict(self.instr),
            "mma": dict(self.mma),
            "flops": self.flops,
            "gmem": {kind: dict(counts) for kind, counts in self.gmem.items()},
            "smem": {kind: dict(counts) for kind, counts in self.smem.items()},
            "unique_read": self.unique_read,
            "unique_write": self.unique_write,
            "barriers": self.barriers,
            "local_bytes": self.local_bytes,
            "shared_bytes": self.shared_bytes,
            "warp_instructions": self.warp_instructions,
            "seconds": self.seconds,
        }

    def hot(self, what: str = "wavefronts", count: int = 8) -> str:
        """The instructions with the most shared-memory `wavefronts` or global `sectors`, one a line."""
        if self.parsed is None:
            return ""
        sites = sorted(self.sites.items(), key=lambda site: -site[1][what])
        lines = []
        for index, counts in sites[:count]:
            if counts[what]:
                ideal = counts["ideal"] if what == "wavefronts" else -(-counts["bytes"] // 32)
                ratio = counts[what] / max(1, ideal)
                where = self.parsed.instrs[index].where()
                lines.append(f"{counts[what]:>10} {what} (x{ratio:.2f} of ideal)  {where}")
        return "\n".join(lines)

    def __str__(self) -> str:
        lines = [
            f"{self.ctas} CTAs x {self.threads} threads, {self.shared_bytes} B shared, "
            f"{self.warp_instructions} warp-instructions, {self.barriers} barriers, "
            f"local {self.local_bytes} B/thread",
            "  instr  " + ", ".join(f"{name} {count}" for name, count in self.instr.most_common()),
        ]
        for name, count in self.mma.items():
            lines.append(f"  mma    {name}: {count} ({self.mma_flops[name] / 1e6:.3f} MFLOP)")
        for kind, c in self.gmem.items():
            used = c["bytes"] / max(1, 32 * c["sectors"])
            each = c["sectors"] / max(1, c["requests"])
            lines.append(
                f"  global {kind}: {c['requests']} requests, {c['bytes']} B, {c['sectors']} sectors "
                f"({each:.1f}/request, {used:.0%} used)"
            )
        for kind, c in self.smem.items():
            ratio = c["wavefronts"] / max(1, c["ideal"])
            lines.append(
                f"  shared {kind}: {c['requests']} requests, {c['wavefronts']} wavefronts "
                f"(x{ratio:.2f} of conflict-free)"
            )
        lines.append(f"  unique DRAM sectors: read {self.unique_read} B, written {self.unique_write} B")
        return "\n".join(lines)


def sectors(addresses: Array, mask: Array | None) -> tuple[int, int]:
    """Global access of all lanes, u64 addresses -> (requests, 32-byte sectors summed over warps)."""
    sector: Array = (addresses >> np.uint64(5)).reshape(-1, 32)
    if mask is not None and not mask.all():
        active = mask.reshape(-1, 32)
        # inactive lanes take the sector of an active lane of their warp
        first = sector[np.arange(len(sector)), active.argmax(1)]
        sector = np.where(active, sector, first[:, None])[active.any(1)]
    requests = len(sector)
    if requests == 0:
        return 0, 0
    if not (sector[:, 1:] >= sector[:, :-1]).all():
        sector = np.sort(sector, 1)
    return requests, requests + int(np.count_nonzero(sector[:, 1:] != sector[:, :-1]))


def wavefronts(addresses: Array, size: int, mask: Array | None) -> tuple[int, int, int]:
    """Shared access of `size` bytes a lane -> (requests, wavefronts, conflict-free wavefronts).

    8-byte accesses go by half-warps, 16-byte ones by quarter-warps; in each phase a bank, 4 bytes wide, 32
    of them, serves one distinct word in each wavefront.
    """
    lanes = 32 if size <= 4 else 16 if size == 8 else 8
    address = addresses.reshape(-1, lanes).astype(np.int64)
    active = np.ones(address.shape, bool) if mask is None else mask.reshape(-1, lanes)
    word = address[:, :, None] // 4 + np.arange(max(1, size // 4))
    word = np.where(active[:, :, None], word, -1).reshape(len(address), -1)
    word.sort(axis=1)
    distinct = np.ones(word.shape, bool)
    distinct[:, 1:] = word[:, 1:] != word[:, :-1]
    distinct &= word >= 0
    phase = np.broadcast_to(np.arange(len(word))[:, None], word.shape)[distinct]
    per_bank = np.bincount(phase * 32 + word[distinct] % 32, minlength=len(word) * 32).reshape(-1, 32)
    live = active.any(1)
    # ldmatrix of fewer than 32 rows counts its requests itself
    requests = int(live.reshape(-1, 32 // lanes).any(1).sum()) if active.size % 32 == 0 else -1
    return requests, int(per_bank.max(1).sum()), int(live.sum())
