"""What an instruction reads and writes, and the class that it is counted in."""

from __future__ import annotations

import re

from .isa import TYPE_SIZE, Addr, Instr, Not, Operand, Reg

_NO_DESTINATION = frozenset(
    [
        "st",
        "cp",
        "bra",
        "bar",
        "barrier",
        "red",
        "call",
        "ret",
        "exit",
        "prefetch",
        "membar",
        "fence",
        "nanosleep",
        "trap",
        "discard",
        "applypriority",
        "stmatrix",
    ]
)
_MMA_TYPES = frozenset(
    ["f16", "bf16", "tf32", "f32", "f64", "s32", "s8", "u8", "e4m3", "e5m2", "b1", "s4", "u4"]
)
_SPECIAL_FUNCTIONS = frozenset(["ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh"])
_HALF = ("f16", "bf16", "f16x2", "bf16x2")
_CLASS = {
    "mma": "mma",
    "ldmatrix": "ldmatrix",
    "shfl": "shfl",
    **dict.fromkeys(("atom", "red"), "atom"),
    **dict.fromkeys(("vote", "match", "redux", "activemask"), "vote"),
    **dict.fromkeys(("bar", "barrier", "membar", "fence", "nanosleep"), "sync"),
    **dict.fromkeys(("bra", "ret", "exit", "call", "trap", "brx"), "branch"),
    **dict.fromkeys(("mov", "cvta", "createpolicy", "prefetch"), "mov"),
}


def np_code(type_: str) -> str:
    """The numpy code of the view in which arithmetic of a PTX type is done."""
    if type_ in _HALF:
        return "u4" if type_.endswith("x2") else "u2"
    if type_ == "pred":
        return "b"
    return {"f": "f", "s": "i", "u": "u", "b": "u"}[type_[0]] + str(max(2, TYPE_SIZE[type_]))


def reads_writes(instr: Instr) -> tuple[set[int], set[int]]:
    """Indices of the registers that an instruction reads and writes."""
    reads: set[int] = set()
    writes: set[int] = set()
    if instr.guard:
        reads.add(instr.guard[0].index)
    first = 0 if instr.op in _NO_DESTINATION else 1
    for operand in instr.ops[:first]:
        _collect(operand, writes)
    for operand in instr.ops[first:]:
        _collect(operand, reads)
    return reads, writes


def _collect(operand: Operand, into: set[int]) -> None:
    if isinstance(operand, Reg):
        into.add(operand.index)
    elif isinstance(operand, Not):
        into.add(operand.reg.index)
    elif isinstance(operand, Addr):
        _collect(operand.base, into)
    elif isinstance(operand, tuple):
        for element in operand:
            _collect(element, into)


def mma_kind(instr: Instr) -> tuple[tuple[int, int, int], str, str]:
    """(m, n, k), element type and accumulator type of an mma.sync."""
    shape = next(match for part in instr.parts if (match := re.fullmatch(r"m(\d+)n(\d+)k(\d+)", part)))
    types = [part for part in instr.parts if part in _MMA_TYPES]
    m, n, k = (int(size) for size in shape.groups())
    return (m, n, k), types[1], types[0]


def classify(instr: Instr) -> tuple[str, int]:
    """(class, weight): the weight is about the number of machine instructions that it becomes.

    64-bit integer arithmetic weighs 2, IEEE divisions and roots about 8.
    """
    op = instr.op
    if op in ("ld", "st"):
        return ("param" if instr.space in ("param", "const") else f"{op}.{instr.space}"), 1
    if op in _CLASS:
        return _CLASS[op], 1
    if op == "cp":
        return ("cp.async" if instr.has("global") else "sync"), 1
    if op == "cvt":
        return ("cvt" if any(_is_float_name(part) for part in instr.parts) else "int"), 1
    return _classify_arithmetic(op, instr)


def _is_float_name(part: str) -> bool:
    return (part in TYPE_SIZE and part[0] in "fb") or part.startswith(("e4m3", "e5m2", "tf32"))


def _classify_arithmetic(op: str, instr: Instr) -> tuple[str, int]:
    type_ = instr.dtype
    if op in _SPECIAL_FUNCTIONS and not instr.has("rn"):
        return "mufu", 1
    exact_division = op == "div" and type_ in ("f32", "f64") and not instr.has("full", "approx")
    if op in _SPECIAL_FUNCTIONS or exact_division:
        return "fp32", 8
    if op == "div" and type_ == "f32":
        return "mufu", 1
    if op in ("div", "rem"):
        return "int", 20 if type_[1:] == "32" else 70
    if type_ in ("f64", "f32"):
        return {"f64": "fp64", "f32": "fp32"}[type_], 1
    if type_ in _HALF:
        return "half", 1
    if op in ("mul", "mad", "dp4a", "dp2a", "madc"):
        return "imul", 1 if type_[1:] == "32" else 3
    return "int", 2 if type_.endswith("64") else 1
