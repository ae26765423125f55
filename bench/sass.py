"""Reading a cubin: registers, spills, access widths, and what the main loop consists of.

cuobjdump and nvdisasm ship inside triton. The main loop is found in the control flow graph, as ptxas moves
rarely taken blocks out of line.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .control_flow import loops

# Tensor core instructions of a warp, and those of a warp group (sm_90).
MMA = frozenset({"HMMA", "IMMA", "QMMA", "OMMA", "DMMA"})
WARP_GROUP_MMA = frozenset({"HGMMA", "IGMMA", "QGMMA"})
GLOBAL_ACCESSES = ("LDGSTS", "LDG", "STG")

INSTRUCTION_BYTES = 16

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);?")
# how CUDA 12.8 shows an instruction's scheduling on sm_120: "&req={1} ?trans6"
_SCHEDULING = re.compile(r"(?:^|\s)[&?]\w.*")
_TARGET = re.compile(r"(?:^|[,\s])0x([0-9a-f]+)\s*$")
_WIDTHS = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}


@dataclass(frozen=True, slots=True)
class Resources:
    """Of one kernel, from `cuobjdump -res-usage`: shared memory is the static part alone."""

    registers: int
    stack_bytes: int
    shared_bytes: int


@dataclass(frozen=True, slots=True)
class Instruction:
    """One SASS instruction: `opcode` with all its modifiers, `guard` the predicate before it, if any."""

    opcode: str
    operands: str = ""
    guard: str = ""

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.split(".", 1)[0]

    @property
    def target(self) -> int | None:
        """The instruction that a branch leads to, by its number in the listing."""
        match = _TARGET.search(self.operands)
        return int(match[1], 16) // INSTRUCTION_BYTES if match else None


@dataclass(frozen=True, slots=True)
class Loop:
    """What one iteration of a loop issues, by opcode name; NOPs are left out."""

    instructions: Counter[str] = field(default_factory=Counter)

    @property
    def mma(self) -> int:
        """Tensor core instructions, of a warp or of a warp group."""
        return sum(count for name, count in self.instructions.items() if name in MMA | WARP_GROUP_MMA)

    @property
    def other(self) -> int:
        """All the others."""
        return self.instructions.total() - self.mma

    @property
    def other_per_mma(self) -> float | None:
        """None for a loop without tensor core instructions."""
        return self.other / self.mma if self.mma else None


@dataclass(frozen=True, slots=True)
class Sass:
    """The counts of one kernel's code."""

    instructions: Counter[str]
    accesses: dict[str, Counter[int]]
    """LDG, LDGSTS (cp.async) and STG, each by width in bits."""
    main_loop: Loop | None


def resources(cubin: bytes) -> Resources:
    """Raises ValueError when cuobjdump's answer can't be read."""
    from triton import knobs

    return parse_resources(_tool(knobs.nvidia.cuobjdump.path, ["-res-usage"], cubin))


def disassemble(codes: Sequence[bytes], machine: str) -> list[list[Instruction]]:
    """Instructions of each code (of `code`) for one `machine`, in one run: nvdisasm takes 0.3 s to start.

    Branch targets count from the first instruction of all.
    """
    from triton import knobs

    # without its dataflow analysis, which is only for branches through a register
    text = _tool(knobs.nvidia.nvdisasm.path, ["-ndf", "-b", machine], b"".join(codes))
    listing = parse_listing(text)
    if len(listing) * INSTRUCTION_BYTES != sum(map(len, codes)):
        raise ValueError(f"nvdisasm: {len(listing)} instructions in {sum(map(len, codes))} bytes of code")
    rest = iter(listing)
    return [[next(rest) for _ in range(len(one) // INSTRUCTION_BYTES)] for one in codes]


def code(cubin: bytes) -> bytes:
    """The machine code of a cubin: its `.text` sections (ELF-64, little-endian)."""
    (headers,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names_at = struct.unpack_from("<HHH", cubin, 0x3A)
    # name, type, flags, address, offset, size
    sections = [struct.unpack_from("<IIQQQQ", cubin, headers + i * size) for i in range(count)]
    names = cubin[sections[names_at][4] :]
    return b"".join(
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in sections
        if names.startswith(b".text.", name)
    )


def _tool(path: str, options: list[str], data: bytes) -> str:
    with tempfile.TemporaryDirectory(prefix="qtrain-cubin-") as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(data)
        done = subprocess.run([path, *options, str(file)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(f"{Path(path).name} {' '.join(options)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def parse_resources(text: str) -> Resources:
    """Of what `cuobjdump -res-usage` prints.

    Raises:
        ValueError: a figure is missing.
    """
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED):(\d+)", text)}
    if len(found) != 3:
        raise ValueError(f"no REG, STACK and SHARED in the output of cuobjdump: {text[:200]!r}")
    return Resources(found["REG"], found["STACK"], found["SHARED"])


def parse_listing(text: str) -> list[Instruction]:
    """Of what nvdisasm prints."""
    matches = (_INSTRUCTION.match(line) for line in text.splitlines())
    return [
        Instruction(match[3], _SCHEDULING.sub("", match[4]).strip(), match[2] or "")
        for match in matches
        if match
    ]


def count_sass(instructions: Sequence[Instruction], first: int = 0) -> Sass:
    """The counts of one kernel, whose first instruction is number `first` for its branches."""
    accesses: dict[str, Counter[int]] = {name: Counter() for name in GLOBAL_ACCESSES}
    for instruction in instructions:
        if instruction.name in accesses:
            accesses[instruction.name][_width(instruction.opcode)] += 1
    return Sass(
        instructions=Counter(instruction.name for instruction in instructions),
        accesses=accesses,
        main_loop=_main_loop(instructions, first),
    )


def _width(opcode: str) -> int:
    """Bits of one thread's access; 32 when no modifier says so."""
    return next((_WIDTHS[part] for part in opcode.split(".") if part in _WIDTHS), 32)


def _main_loop(instructions: Sequence[Instruction], first: int) -> Loop | None:
    """The innermost loop with the most tensor core instructions; without any, the longest innermost one."""
    counted = [
        (body, Loop(Counter(instructions[i].name for i in body if instructions[i].name != "NOP")))
        for body in loops(successors(instructions, first))
    ]
    with_mma = [(body, loop) for body, loop in counted if loop.mma]
    candidates = with_mma or counted
    innermost = [loop for body, loop in candidates if not any(other < body for other, _ in candidates)]
    return max(innermost, key=lambda loop: (loop.mma, loop.other), default=None)


def successors(instructions: Sequence[Instruction], first: int = 0) -> list[list[int]]:
    """Where control can go after each instruction, by position."""
    edges: list[list[int]] = []
    # convergence barrier -> where its threads meet
    meeting: dict[str, int] = {}
    for position, instruction in enumerate(instructions):
        following = [position + 1] if position + 1 < len(instructions) else []
        name, guarded, target = instruction.name, bool(instruction.guard), instruction.target
        goals = [target - first] if target is not None and 0 <= target - first < len(instructions) else []
        barrier = instruction.operands.split(",")[0].strip()
        if name == "BSSY" and goals:
            meeting[barrier] = goals[0]
        if name in ("BRA", "JMP"):
            # one with another operand before its target is conditional too
            conditional = guarded or "," in instruction.operands
            edges.append(goals + (following if conditional else []))
        elif name == "BSYNC" and barrier in meeting:
            edges.append([meeting[barrier], *(following if guarded else [])])
        elif name in ("EXIT", "RET", "BRX", "JMX", "KILL") and not guarded:
            edges.append([])
        else:
            edges.append(following)
    return edges
