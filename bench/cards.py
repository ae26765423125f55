"""`python -m qtrain.bench.cards`: a card per Triton kernel, architecture and configuration, without a GPU.

A card is read from compiled code: registers, spills, shared memory, occupancy, tensor core instructions,
widths of global accesses, and what the main loop issues beside the tensor cores. Nothing on it was timed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .accesses import global_accesses, widths_by_pointer
from .aot import Compiled, NotCompiled, compile_options, compile_specimen
from .architectures import RESERVED_SHARED, architecture, blocks_per_sm
from .sass import MMA, WARP_GROUP_MMA, Sass, code, count_sass, disassemble, resources

if TYPE_CHECKING:
    from qtrain.kernels.specimens import Specimen

    from .cards_emulated import Emulated

Widths = dict[str, dict[int, int]]


@dataclass(frozen=True, slots=True)
class Card:
    """One kernel in one configuration, compiled for one architecture."""

    specimen: str
    kernel: str
    arch: int
    budget: str
    num_warps: int
    num_stages: int
    registers: int
    stack_bytes: int
    spill_stores: int
    spill_loads: int
    """STL and LDL instructions of the code."""
    shared_bytes: int
    """Static and dynamic, of one block."""
    blocks_per_sm: int
    occupancy: float
    """Resident warps / what the multiprocessor holds."""
    mma: int
    """HMMA and its kin in the whole code."""
    warp_group_mma: int
    accesses: Widths
    """LDG, LDGSTS, STG: {bits: instructions}, from SASS."""
    pointers: dict[str, Widths]
    """For each pointer argument load, copy, store, atomic: {bits: instructions}, from PTX."""
    hot: tuple[str, ...]
    main_loop: dict[str, int] | None
    """Instructions of one iteration of the main loop by opcode, NOPs left out."""
    other_per_mma: float | None
    """In the main loop, instructions that are not the tensor cores' to one that is."""
    emulated: Emulated | None = None
    """What the emulator counted; None where it was not asked."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON, where widths become strings."""
        return asdict(self) | {"emulated": self.emulated.as_dict() if self.emulated else None}


_CARDS: dict[tuple[Any, ...], Card] = {}


def make_card(specimen: Specimen, arch: int) -> Card:
    """Compile and read; a specimen is compiled once in a process.

    Raises:
        NoTriton: triton is missing.
        NotCompiled: the compiler refuses the kernel.
        ValueError: the specimen doesn't fit its kernel, or the architecture is unknown.
    """
    key = _key(specimen, arch)
    if key not in _CARDS:
        [_CARDS[key]] = _read([specimen], [compile_specimen(specimen, arch)], arch)
    return _CARDS[key]


def prepare_cards(
    specimens: Sequence[Specimen],
    arch: int,
    *,
    threads: int = 1,
    progress: Callable[[str], object] = lambda _: None,
) -> None:
    """Make many cards, so that `make_card` has them ready: reading them together is quicker.

    Compiles on so many threads. What can't be compiled is left out: `make_card` will say why.
    """

    def attempt(specimen: Specimen) -> Compiled | None:
        progress(f"sm_{arch} {specimen.name}")
        with suppress(NotCompiled, ValueError):
            return compile_specimen(specimen, arch)
        return None

    missing = [specimen for specimen in specimens if _key(specimen, arch) not in _CARDS]
    with ThreadPoolExecutor(threads) as pool:
        found = zip(missing, pool.map(attempt, missing), strict=True)
        done = [(specimen, compiled) for specimen, compiled in found if compiled is not None]
    if done:
        read = [specimen for specimen, _ in done]
        cards = _read(read, [compiled for _, compiled in done], arch)
        _CARDS.update((_key(specimen, arch), card) for specimen, card in zip(read, cards, strict=True))


def _key(specimen: Specimen, arch: int) -> tuple[Any, ...]:
    parts: list[Mapping[str, Any]] = [specimen.signature, specimen.constexprs, compile_options(specimen)]
    texts = [repr(sorted((name, repr(value)) for name, value in part.items())) for part in parts]
    described = (specimen.name, specimen.budget, specimen.hot, specimen.aligned)
    return (specimen.kernel, arch, *described, *texts)


def _read(specimens: Sequence[Specimen], compiled: Sequence[Compiled], arch: int) -> list[Card]:
    codes = [code(one.cubin) for one in compiled]
    first, cards = 0, []
    for specimen, one, instructions in zip(
        specimens, compiled, disassemble(codes, architecture(arch).machine), strict=True
    ):
        cards.append(_card(specimen, one, count_sass(instructions, first), arch))
        first += len(instructions)
    return cards


def _card(specimen: Specimen, compiled: Compiled, sass: Sass, arch: int) -> Card:
    used = resources(compiled.cubin)
    # from sm_90 on cuobjdump counts the driver's part too, where a block has shared memory at all
    static = used.shared_bytes if arch < 90 else max(0, used.shared_bytes - RESERVED_SHARED)
    shared = static + compiled.shared_bytes
    blocks = blocks_per_sm(arch, warps=specimen.num_warps, registers=used.registers, shared_bytes=shared)
    by_pointer = widths_by_pointer(global_accesses(compiled.ptx, compiled.pointers))
    loop = sass.main_loop
    return Card(
        specimen=specimen.name,
        kernel=specimen.kernel.__name__,
        arch=arch,
        budget=specimen.budget,
        num_warps=specimen.num_warps,
        num_stages=specimen.num_stages,
        registers=used.registers,
        stack_bytes=used.stack_bytes,
        spill_stores=sass.instructions["STL"],
        spill_loads=sass.instructions["LDL"],
        shared_bytes=shared,
        blocks_per_sm=blocks,
        occupancy=blocks * specimen.num_warps / architecture(arch).warps,
        mma=_count(sass.instructions, MMA),
        warp_group_mma=_count(sass.instructions, WARP_GROUP_MMA),
        accesses=_sorted(sass.accesses),
        pointers={name: _sorted(kinds) for name, kinds in by_pointer.items()},
        hot=specimen.hot,
        main_loop=dict(loop.instructions.most_common()) if loop else None,
        other_per_mma=loop.other_per_mma if loop else None,
    )


def _count(instructions: Counter[str], names: frozenset[str]) -> int:
    return sum(instructions[name] for name in names)


def _sorted(widths: Mapping[str, Counter[int]]) -> Widths:
    return {name: dict(sorted(counts.items())) for name, counts in widths.items()}


if __name__ == "__main__":
    import typer

    from .cards_command import cards

    typer.run(cards)
