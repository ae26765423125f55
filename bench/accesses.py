"""Which kernel argument each global access of a PTX program goes through, and how wide it is.

Addresses are followed from the parameters through every instruction that computes with them; what is loaded
from memory carries nothing on. A register takes the pointers of all its definitions, so an address chosen
among two pointers counts for both.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# Pointers that no argument of the kernel's stands for: the launcher's scratch memory, and whatever could not
# be followed.
SCRATCH = "(scratch)"
UNKNOWN = "(unknown)"

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_PREFIX = re.compile(r"^(?:[{}\s]|\$?\w+:)*(?:@!?%\w+\s+)?")
_REGISTER = re.compile(r"%\w+")
_PARAMETER = re.compile(r"\[\s*\w+_param_(\d+)\s*(?:\+\s*0\s*)?\]")
_BRACKET = re.compile(r"\[([^\]]*)\]")
_VECTOR = re.compile(r"\.v(\d+)\b")
_TYPE = re.compile(r"\.[a-z]+(\d+)(?:x2)?$")


@dataclass(frozen=True, slots=True)
class Access:
    """One instruction: `kind` load, store, copy (cp.async) or atomic, `bits` a thread."""

    kind: str
    bits: int
    pointers: frozenset[str]


def global_accesses(ptx: str, pointers: Sequence[str | None]) -> list[Access]:
    """Every global access of a kernel whose PTX parameters are `pointers` (None: no pointer), in order.

    Parameters beyond those are the scratch memory that Triton appends.
    """
    statements = list(_statements(ptx))
    reach = _reach(statements, pointers)
    found = []
    for opcode, operands in statements:
        kind = _kind(opcode)
        if kind is None:
            continue
        brackets = _BRACKET.findall(operands)
        # of the two addresses of a copy, the second is the global one
        address = brackets[-1] if kind == "copy" else brackets[0]
        through = set().union(*(reach.get(name, ()) for name in _REGISTER.findall(address)))
        found.append(Access(kind, _bits(opcode, operands, kind), frozenset(through or {UNKNOWN})))
    return found


def widths_by_pointer(accesses: Sequence[Access]) -> dict[str, dict[str, Counter[int]]]:
    """{pointer: {kind: {bits: instructions}}}."""
    table: dict[str, dict[str, Counter[int]]] = {}
    for access in accesses:
        for pointer in access.pointers:
            table.setdefault(pointer, {}).setdefault(access.kind, Counter())[access.bits] += 1
    return table


def _statements(ptx: str) -> Iterator[tuple[str, str]]:
    """(opcode, operands) of each instruction; guards, labels and directives are left out."""
    for statement in _COMMENT.sub(" ", ptx).split(";"):
        # labels, scopes and directives end without a semicolon: the instruction is the last line
        lines = statement.strip().splitlines()
        text = _PREFIX.sub("", lines[-1] if lines else "")
        if not text:
            continue
        opcode, *operands = text.split(None, 1)
        if re.match(r"[a-z]", opcode):
            yield opcode, operands[0] if operands else ""


def _reach(statements: Sequence[tuple[str, str]], pointers: Sequence[str | None]) -> dict[str, set[str]]:
    """For each register the pointer arguments that it is computed from."""
    reach: dict[str, set[str]] = {}
    steps = []
    for opcode, operands in statements:
        if opcode.startswith("ld.param"):
            match = _PARAMETER.search(operands)
            position = int(match[1]) if match else -1
            name = pointers[position] if position < len(pointers) else SCRATCH
            if match and name is not None:
                reach.setdefault(_REGISTER.findall(operands)[0], set()).add(name)
        elif not opcode.startswith(("ld.", "st.", "cp.", "atom.", "red.", "setp", "mma", "ldmatrix", "bra")):
            written = operands.partition(",")[0]
            registers = _REGISTER.findall(operands)
            if registers and written.strip().startswith("%"):
                steps.append((registers[0], registers[1:]))
            elif written.strip().startswith("{"):
                inside = operands[: operands.index("}")]
                results = _REGISTER.findall(inside)
                steps.extend((result, registers[len(results) :]) for result in results)
    changed = True
    while changed:
        changed = False
        for result, sources in steps:
            new = set().union(*(reach.get(source, ()) for source in sources))
            if not new <= reach.get(result, set()):
                reach.setdefault(result, set()).update(new)
                changed = True
    return reach


def _kind(opcode: str) -> str | None:
    if opcode.startswith("cp.async") and ".global" in opcode:
        return "copy"
    if ".global" not in opcode:
        return None
    if opcode.startswith(("atom.", "red.")):
        return "atomic"
    return {"ld": "load", "st": "store"}.get(opcode.split(".")[0])


def _bits(opcode: str, operands: str, kind: str) -> int:
    if kind == "copy":
        size = operands[operands.rindex("]") + 1 :].strip(" ,\t").split(",")[0]
        return 8 * int(size, 0) if size and size[0].isdigit() else 0
    vector = _VECTOR.search(opcode)
    element = _TYPE.search(opcode)
    return (int(vector[1]) if vector else 1) * (int(element[1]) if element else 0)
