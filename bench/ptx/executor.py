"""Run a kernel: batches of CTAs in lockstep over arrays of one element per thread.

All threads follow one path while branches are uniform. When they diverge, each lane keeps its own block
number and the lowest-numbered block runs next for the lanes that stand there (LLVM lays blocks out so that
they meet again); bar.sync holds lanes back until all live threads of their CTA have come.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from .address_space import AddressSpace, EmulationError, is_tensor
from .blocks import EXIT
from .counters import Counters
from .floats import Array
from .isa import Param
from .memory import Memory
from .memory_base import Setup
from .program import Program, program
from .state import Cta, State

_LANES_PER_BATCH = 4096
_ROTATION = 64  # steps between two turns of the CTA that is furthest along
_POISON: dict[str, tuple[Any, int]] = {
    "b": (bool, 0),
    "u2": (np.uint16, 0xFFFF),
    "u4": (np.uint32, 0xFFFFFFFF),
    "u8": (np.uint64, 0xFFFFFFFFFFFFFFFF),
}
_HIDDEN_POINTERS = 2  # Triton's scratch pointers, the last parameters


def run(
    kernel: Any,
    grid: int | Sequence[int],
    args: Sequence[Any],
    *,
    num_warps: int | None = None,
    shared: int | None = None,
    batch: int | None = None,
    counters: bool = True,
    racecheck: bool = False,
    extra: Iterable[Any] = (),
    max_steps: int | None = None,
    edit: Callable[[str], str] | None = None,
) -> Counters:
    """Execute a kernel over a grid, in place on CPU tensors.

    Args:
        kernel: PTX text, or a CompiledKernel of Triton.
        grid: number of CTAs, up to three dimensions.
        args: CPU tensors, numpy arrays and numbers in the order of the PTX parameters: constexprs and
            arguments specialised as 1 are left out, trailing scratch pointers need not be given.
        num_warps: warps of a CTA; known for a CompiledKernel or from .reqntid.
        shared: bytes of dynamic shared memory; known for a CompiledKernel, else 0.
        batch: CTAs that run together; by default about 4096 threads' worth. 1: one after another.
        counters: False for up to twice the speed without counts.
        racecheck: report shared-memory accesses of two warps without a barrier between them.
        extra: further tensors that may be reached through pointers found in memory.
        max_steps: blocks executed by a batch before it is called a deadlock.
        edit: applied to the PTX text before it runs.

    Raises:
        EmulationError: the kernel did something wrong.
        NotImplementedError: it has an instruction that is not supported.
        TypeError, ValueError: the arguments or the number of threads don't fit.
    """
    start = time.perf_counter()
    ptx = kernel if isinstance(kernel, str) else kernel.asm["ptx"]
    code = program(edit(ptx) if edit else ptx)
    parsed = code.kernel
    metadata = getattr(kernel, "metadata", None)
    if num_warps is None:
        num_warps = metadata.num_warps if metadata else parsed.required_threads // 32
    threads = num_warps * 32
    if parsed.required_threads not in (0, threads):
        raise ValueError(f"the kernel requires {parsed.required_threads} threads, not {threads}")
    if shared is None:
        shared = metadata.shared if metadata else 0
    dynamic = None in parsed.shared.values() and parsed.static_shared
    shared += parsed.dynamic_shared_offset if dynamic else parsed.static_shared
    size = _grid(grid)
    ctas = [(x, y, z) for z in range(size[2]) for y in range(size[1]) for x in range(size[0])]
    scratch = (getattr(metadata, "global_scratch_size", 0) or 0) * len(ctas)
    space, params = _bind(code, args, extra, scratch)
    counts = Counters(
        ctas=len(ctas),
        threads=threads,
        shared_bytes=shared,
        local_bytes=parsed.local_bytes,
        parsed=parsed,
        kernel=None if isinstance(kernel, str) else kernel,
    )
    batch = batch or max(1, _LANES_PER_BATCH // threads)
    hits = [0] * len(code.blocks)
    wavefronts: dict[Any, Any] = {}
    with np.errstate(all="ignore"):
        for i in range(0, len(ctas), batch):
            state = State(parsed, size, ctas[i : i + batch], threads, params)
            setup = Setup(state, space, shared, parsed.local_bytes, counts, counters, racecheck, wavefronts)
            _Batch(code, state, Memory(setup), hits, counts, max_steps).run()
            counts.batches += 1
    _sum_up(counts, code, hits, space)
    counts.seconds = time.perf_counter() - start
    return counts


def _grid(grid: int | Sequence[int]) -> Cta:
    sizes = [int(size) for size in (grid if isinstance(grid, Sequence) else (grid,))]
    x, y, z = (*sizes, 1, 1)[:3]
    return x, y, z


def _sum_up(counts: Counters, code: Program, hits: list[int], space: AddressSpace) -> None:
    for block, passes in zip(code.blocks, hits, strict=True):
        for total, each in (
            (counts.instr, block.counts),
            (counts.mma, block.mma),
            (counts.mma_flops, block.mma_flops),
        ):
            for name, count in each.items():
                if passes:
                    total[name] += count * passes
        counts.warp_instructions += len(block.instrs) * passes
    counts.unique_read = 32 * sum(int(region.read.sum()) for region in space.regions)
    counts.unique_write = 32 * sum(int(region.written.sum()) for region in space.regions)


def _bind(
    code: Program, args: Sequence[Any], extra: Iterable[Any], scratch: int
) -> tuple[AddressSpace, dict[str, bytes]]:
    """The address space of a launch, and each parameter's bytes."""
    parsed = code.kernel
    given = list(args)
    tensors = [(f"argument {i}", value) for i, value in enumerate(given) if is_tensor(value)]
    space = AddressSpace(tensors + [(f"extra {i}", value) for i, value in enumerate(extra)])
    for name, (number, array) in code.variables.items():
        space.add(name, array, number)
    if scratch:
        buffer = np.zeros(scratch + 128, np.uint8)
        given += [None] * (len(parsed.params) - _HIDDEN_POINTERS - len(given)) + [buffer]
        space.add("global scratch", buffer)
    if len(given) > len(parsed.params):
        raise TypeError(f"{len(given)} arguments for {len(parsed.params)} parameters of {parsed.name}")
    params = {
        param.name: _argument(param, value, space)
        for param, value in zip_longest(parsed.params, given, fillvalue=None)
        if param is not None
    }
    return space, params


def _argument(param: Param, value: Any, space: AddressSpace) -> bytes:
    if value is None:
        raw = bytes(param.size)
    elif is_tensor(value):
        raw = struct.pack("<Q", space.virtual_address(value))
    elif param.type in ("f32", "f64") or (isinstance(value, float) and param.size in (4, 8)):
        raw = struct.pack("<f" if param.size == 4 else "<d", float(value))
    else:
        raw = (int(value) & (1 << 8 * param.size) - 1).to_bytes(param.size, "little")
    if len(raw) != param.size:
        raise TypeError(f"argument for {param.name} (.{param.type}) has the wrong size")
    return raw


def _select(predicate: Array, taken: int, other: int) -> Array:
    """The block after a divergent branch, by lane."""
    return np.where(predicate, np.int64(taken), np.int64(other))


class _Batch:
    """The control flow of one batch of CTAs."""

    def __init__(
        self,
        code: Program,
        state: State,
        memory: Memory,
        hits: list[int],
        counters: Counters,
        max_steps: int | None,
    ) -> None:
        self.code, self.state, self.memory = code, state, memory
        self.hits, self.counters = hits, counters
        self.steps, self.max_steps = 0, max_steps
        poison = {key: np.full(state.lanes, value, dtype) for key, (dtype, value) in _POISON.items()}
        self.registers = [poison[storage] for storage in code.kernel.registers]

    def run(self) -> None:
        """Until all threads have left the kernel."""
        block = 0 if self.code.blocks else EXIT
        while block < EXIT:
            following = self._together(block)
            if isinstance(following, tuple):
                predicate, taken, other = following
                block = self._diverged(_select(predicate, taken, other))
            else:
                block = following

    def _step(self) -> None:
        self.steps += 1
        if self.max_steps and self.steps > self.max_steps:
            raise EmulationError(f"too many steps: more than {self.max_steps} blocks, a deadlock?")

    def _together(self, number: int) -> Any:
        """One block for all lanes."""
        self._step()
        block = self.code.blocks[number]
        function = block.fast or self.code.compile(block, masked=False)
        self.hits[number] += self.state.lanes // 32
        following = function(self.registers, self.state, self.memory, None)
        if block.is_barrier:
            self.counters.barriers += len(self.state.ctas)
            if self.memory.races:
                self.memory.races.barrier(None)
        return following

    def _diverged(self, position: Array) -> int:
        """Block by block under masks, until all lanes stand at the same one; returns it."""
        waiting: Array = np.zeros(self.state.lanes, bool)
        while True:
            self._step()
            runnable = np.where(waiting, EXIT + 1, position)
            number = int(runnable.min())
            if number >= EXIT:
                if waiting.any():
                    raise EmulationError(
                        "deadlock: threads wait at a barrier that others have passed or left"
                    )
                return EXIT
            if self.steps % _ROTATION == 0 and len(self.state.ctas) > 1:
                # so that a CTA that spins on a lock can't starve the one that holds it
                first = runnable.reshape(-1, self.state.threads).min(1)
                number = int(first[first < EXIT].max())
            mask = runnable == number
            if mask.all():
                return number
            position = self._masked(number, mask, position)
            if self.code.blocks[number].is_barrier:
                waiting |= mask
                if self.memory.races:
                    self.memory.races.barrier(mask)
            if waiting.any():
                waiting = self._release(waiting, position)

    def _masked(self, number: int, mask: Array, position: Array) -> Array:
        """One block for some lanes -> where every lane stands now."""
        block = self.code.blocks[number]
        function = block.masked or self.code.compile(block, masked=True)
        self.hits[number] += int(np.count_nonzero(mask.reshape(-1, 32).any(1)))
        self.state.exited = position == EXIT
        following = function(self.registers, self.state, self.memory, mask)
        if isinstance(following, tuple):
            predicate, taken, other = following
            following = _select(predicate, taken, other)
        return np.where(mask, following, position)

    def _release(self, waiting: Array, position: Array) -> Array:
        """Let those CTAs go on that have all come to the barrier."""
        threads = self.state.threads
        all_here = (waiting | (position == EXIT)).reshape(-1, threads).all(1)
        released = all_here & waiting.reshape(-1, threads).any(1)
        self.counters.barriers += int(released.sum())
        return waiting & ~np.repeat(released, threads)
