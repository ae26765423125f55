"""A kernel's basic blocks, and which registers are alive at the end of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from .classify import classify, mma_kind, reads_writes
from .isa import Instr, Kernel, Sym

EXIT = 1 << 30  # the "block number" of the end of the kernel
# (registers, launch state, memory, mask) -> next block, or (predicate, taken, not taken)
BlockFunction = Callable[[Any, Any, Any, Any], Any]
_ENDS_BLOCK = ("bra", "ret", "exit", "trap", "brx")


class Block:
    """A run of instructions with one way in, its successors, and what one pass of a warp counts."""

    def __init__(self, index: int, instrs: list[Instr]) -> None:
        self.index, self.instrs = index, instrs
        self.next = self.target = EXIT  # falling through; taking the branch
        self.successors: list[int] = []
        self.live_out: set[int] = set()
        self.fast: BlockFunction | None = None  # all lanes active
        self.masked: BlockFunction | None = None
        self.is_barrier = instrs[-1].is_barrier
        self.counts: Counter[str] = Counter()
        self.mma: Counter[str] = Counter()
        self.mma_flops: Counter[str] = Counter()
        for instr in instrs:
            name, weight = classify(instr)
            self.counts[name] += weight
            if instr.op == "mma":
                m, n, k = mma_kind(instr)[0]
                name = ".".join(p for p in instr.parts if p not in ("sync", "aligned", "row", "col"))
                self.mma[name] += 1
                self.mma_flops[name] += 2 * m * n * k


def split_into_blocks(kernel: Kernel) -> list[Block]:
    """In the order of the text, with successors and liveness."""
    count = len(kernel.instrs)
    starts = {0, *kernel.labels.values()}
    starts |= {i + 1 for i, instr in enumerate(kernel.instrs) if instr.op in _ENDS_BLOCK or instr.is_barrier}
    edges = [*sorted(start for start in starts if start < count), count]
    blocks = [Block(i, kernel.instrs[start:end]) for i, (start, end) in enumerate(pairwise(edges))]
    at = {start: i for i, start in enumerate(edges[:-1])}
    for block in blocks:
        last = block.instrs[-1]
        block.next = block.index + 1 if block.index + 1 < len(blocks) else EXIT
        if last.op == "bra":
            block.target = at.get(kernel.labels[last.operand(0, Sym).name], EXIT)
            block.successors = [block.target] + ([block.next] if last.guard else [])
        elif last.op in ("ret", "exit"):
            block.successors = [block.next] if last.guard else []
        else:
            block.successors = [block.next]
    _liveness(blocks)
    return blocks


def _liveness(blocks: list[Block]) -> None:
    used_defined = [_used_and_defined(block) for block in blocks]
    live_in = [set(used) for used, _ in used_defined]
    changed = True
    while changed:
        changed = False
        for block in reversed(blocks):
            block.live_out = set().union(*(live_in[s] for s in block.successors if s < EXIT))
            used, defined = used_defined[block.index]
            new = used | (block.live_out - defined)
            if new != live_in[block.index]:
                live_in[block.index] = new
                changed = True


def _used_and_defined(block: Block) -> tuple[set[int], set[int]]:
    used: set[int] = set()
    defined: set[int] = set()
    for instr in block.instrs:
        reads, writes = reads_writes(instr)
        used |= reads - defined
        if instr.guard is None:
            defined |= writes
        else:  # the old value may stay
            used |= writes - defined
    return used, defined
