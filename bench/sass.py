"""Reading a cubin: registers, spills, access widths, and what the main loop consists of.

The disassembler and cuobjdump ship inside triton. The main loop is found in the control flow graph, as ptxas
moves rarely taken blocks out of line.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# Tensor core instructions of a warp, and those of a warp group (sm_90).
MMA = frozenset({"HMMA", "IMMA", "QMMA", "OMMA", "DMMA"})
WARP_GROUP_MMA = frozenset({"HGMMA", "IGMMA", "QGMMA"})
GLOBAL_ACCESSES = ("LDGSTS", "LDG", "STG")

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);?")
_LABEL = re.compile(r"^([.$]\w[\w.$]*):\s*$")
_SECTION = re.compile(r"^\s*\.section\s+\.text\.")
_TARGET = re.compile(r"`\(([^)]+)\)")
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


def disassemble(cubin: bytes) -> str:
    """SASS as nvdisasm prints it, with labels for branch targets."""
    from triton import knobs

    # without its dataflow analysis, which is only for branches through a register
    return _tool(knobs.nvidia.nvdisasm.path, ["-c", "-ndf"], cubin)


def _tool(path: str, options: list[str], cubin: bytes) -> str:
    with tempfile.TemporaryDirectory(prefix="qtrain-cubin-") as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
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


def parse_sass(text: str) -> Sass:
    """Of what `nvdisasm -c` prints.

    Raises:
        ValueError: there is no instruction in it.
    """
    instructions, labels = _listing(text)
    if not instructions:
        raise ValueError(f"no instruction in the output of nvdisasm: {text[:200]!r}")
    accesses: dict[str, Counter[int]] = {name: Counter() for name in GLOBAL_ACCESSES}
    for instruction in instructions:
        if instruction.name in accesses:
            accesses[instruction.name][_width(instruction.opcode)] += 1
    return Sass(
        instructions=Counter(instruction.name for instruction in instructions),
        accesses=accesses,
        main_loop=_main_loop(instructions, labels),
    )


def _listing(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """All instructions, and for each label the position of what follows it."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if match := _INSTRUCTION.match(line):
            instructions.append(Instruction(match[3], match[4].strip(), match[2] or ""))
        elif match := _LABEL.match(line):
            labels[match[1]] = len(instructions)
    return instructions, labels


def _width(opcode: str) -> int:
    """Bits of one thread's access; 32 when no modifier says so."""
    return next((_WIDTHS[part] for part in opcode.split(".") if part in _WIDTHS), 32)


def _main_loop(instructions: Sequence[Instruction], labels: dict[str, int]) -> Loop | None:
    """The innermost loop with the most tensor core instructions; without any, the longest innermost one."""
    bodies = loops(successors(instructions, labels))
    counted = [
        (body, Loop(Counter(instructions[i].name for i in body if instructions[i].name != "NOP")))
        for body in bodies
    ]
    with_mma = [(body, loop) for body, loop in counted if loop.mma]
    candidates = with_mma or counted
    innermost = [loop for body, loop in candidates if not any(other < body for other, _ in candidates)]
    return max(innermost, key=lambda loop: (loop.mma, loop.other), default=None)


def successors(instructions: Sequence[Instruction], labels: dict[str, int]) -> list[list[int]]:
    """Where control can go after each instruction, by position."""
    edges: list[list[int]] = []
    converge: dict[str, int] = {}
    for position, instruction in enumerate(instructions):
        following = [position + 1] if position + 1 < len(instructions) else []
        target = _TARGET.search(instruction.operands)
        goal = labels.get(target[1]) if target else None
        register = instruction.operands.split(",")[0].strip()
        name = instruction.name
        if name == "BSSY" and goal is not None:
            converge[register] = goal
        if name in ("BRA", "JMP"):
            conditional = bool(instruction.guard) or not instruction.operands.startswith("`")
            goals = [goal] if goal is not None and goal < len(instructions) else []
            edges.append(goals + (following if conditional else []))
        elif name == "BSYNC" and converge.get(register, len(instructions)) < len(instructions):
            edges.append([converge[register], *(following if instruction.guard else [])])
        elif name in ("EXIT", "RET", "BRX", "JMX", "KILL") and not instruction.guard:
            edges.append([])
        else:
            edges.append(following)
    return edges


def loops(edges: Sequence[Sequence[int]]) -> list[frozenset[int]]:
    """Bodies of the natural loops of a control flow graph whose entry is node 0.

    A back edge leads to a node that dominates its start; the body is what reaches the edge without passing
    that node. Loops with one head are one loop. A node that only jumps to itself is no loop: ptxas pads with
    those.
    """
    order, before = _reverse_postorder(edges)
    dominator = _dominators(order, before)
    bodies: dict[int, set[int]] = {}
    for node in order:
        for head in edges[node]:
            if head != node and _dominates(dominator, head, node):
                body = bodies.setdefault(head, {head})
                waiting = [node]
                while waiting:
                    inside = waiting.pop()
                    if inside not in body:
                        body.add(inside)
                        waiting.extend(before[inside])
    return [frozenset(body) for body in bodies.values()]


def _reverse_postorder(edges: Sequence[Sequence[int]]) -> tuple[list[int], dict[int, list[int]]]:
    """Nodes reachable from 0, and their reachable predecessors."""
    before: dict[int, list[int]] = {0: []}
    finished: list[int] = []
    path = [(0, iter(edges[0]))]
    while path:
        node, rest = path[-1]
        for goal in rest:
            if goal in before:
                before[goal].append(node)
            else:
                before[goal] = [node]
                path.append((goal, iter(edges[goal])))
                break
        else:
            finished.append(node)
            path.pop()
    return finished[::-1], before


def _dominators(order: Iterable[int], before: dict[int, list[int]]) -> dict[int, int]:
    """Immediate dominators (Cooper, Harvey and Kennedy, A Simple, Fast Dominance Algorithm)."""
    nodes = list(order)
    rank = {node: position for position, node in enumerate(nodes)}
    dominator = {0: 0}
    changed = True
    while changed:
        changed = False
        for node in nodes[1:]:
            known = [one for one in before[node] if one in dominator]
            meeting = known[0]
            for one in known[1:]:
                while one != meeting:
                    if rank[one] > rank[meeting]:
                        one = dominator[one]
                    else:
                        meeting = dominator[meeting]
            if dominator.get(node) != meeting:
                dominator[node] = meeting
                changed = True
    return dominator


def _dominates(dominator: dict[int, int], upper: int, node: int) -> bool:
    while node not in (upper, 0):
        node = dominator[node]
    return node == upper
