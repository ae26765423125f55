"""What PTX text is parsed into: operands, instructions and the kernel that holds them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

# PTX type -> numpy code of the storage of a register of that type
STORAGE = {
    "pred": "b",
    **dict.fromkeys(("b8", "u8", "s8", "b16", "u16", "s16", "f16", "bf16"), "u2"),
    **dict.fromkeys(("b32", "u32", "s32", "f32", "f16x2", "bf16x2"), "u4"),
    **dict.fromkeys(("b64", "u64", "s64", "f64"), "u8"),
}
# bytes in memory
TYPE_SIZE = {name: {"u2": 2, "u4": 4, "u8": 8}.get(code, 1) for name, code in STORAGE.items()} | {
    "b8": 1,
    "u8": 1,
    "s8": 1,
}
UNSIGNED = {1: "u1", 2: "u2", 4: "u4", 8: "u8"}  # numpy code by width

SPACES = ("global", "shared", "local", "param", "const")


@dataclass(frozen=True, slots=True)
class Reg:
    """A register; `storage` is the numpy code of its array: b, u2, u4 or u8."""

    index: int
    storage: str


@dataclass(frozen=True, slots=True)
class Imm:
    """An integer, or the bits of a floating-point literal (`float_size` 4 or 8; 0 for plain integers)."""

    value: int
    float_size: int = 0


@dataclass(frozen=True, slots=True)
class Sym:
    """A variable, a label or a function."""

    name: str


@dataclass(frozen=True, slots=True)
class Special:
    """A special register such as %tid.x, without its percent sign."""

    name: str


@dataclass(frozen=True, slots=True)
class Not:
    """A negated predicate."""

    reg: Reg


class Slot:
    """A .param variable of a call sequence: a register for each offset used."""

    def __init__(self) -> None:
        self.regs: dict[int, Any] = {}


@dataclass(frozen=True, slots=True)
class Addr:
    """[base + offset]."""

    base: Reg | Imm | Sym | Slot
    offset: int


# a tuple is a vector {a, b}, a pair p|q or the arguments (a, b) of a call
Operand = Reg | Imm | Sym | Special | Addr | Not | Slot | tuple[Any, ...]
Kind = TypeVar("Kind")

SINK = Special("_")


@dataclass(slots=True)
class Instr:
    """One instruction, with where it stands in the PTX text and in the kernel's source."""

    parts: tuple[str, ...]  # the opcode split at its dots
    ops: list[Operand]
    guard: tuple[Reg, bool] | None  # (predicate, negated)
    line: int
    text: str
    source: str = ""  # file:line, from .loc
    index: int = -1

    @property
    def op(self) -> str:
        """The opcode without its modifiers."""
        return self.parts[0]

    @property
    def dtype(self) -> str:
        """The last modifier: the type, where an instruction has one."""
        return self.parts[-1]

    @property
    def is_float(self) -> bool:
        """Whether the type is a floating-point one."""
        return self.dtype.startswith(("f", "bf"))

    @property
    def is_barrier(self) -> bool:
        """Whether the whole CTA waits here."""
        return self.op in ("bar", "barrier") and "warp" not in self.parts

    @property
    def space(self) -> str:
        """The state space of a memory access; generic addresses are taken as global."""
        names = (part.split("_")[0] for part in self.parts[1:])
        return next((name for name in names if name in SPACES), "global")

    def has(self, *modifiers: str) -> bool:
        """Whether any of the modifiers is given."""
        return any(modifier in self.parts for modifier in modifiers)

    def operand(self, i: int, kind: type[Kind]) -> Kind:
        """Operand i, which must be of this kind."""
        operand = self.ops[i]
        if not isinstance(operand, kind):
            raise NotImplementedError(f"operand {i} is no {kind.__name__}")
        return operand

    def where(self) -> str:
        """For error messages."""
        return f"PTX line {self.line}: `{self.text}`" + (f" ({self.source})" if self.source else "")


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter of the entry."""

    name: str
    type: str
    size: int


@dataclass
class Kernel:
    """One PTX entry; offsets and sizes in bytes."""

    name: str
    params: list[Param]
    registers: list[str] = field(default_factory=list)  # their storage
    instrs: list[Instr] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    shared: dict[str, int | None] = field(default_factory=dict)  # name -> offset; None: after the static ones
    static_shared: int = 0
    local: dict[str, int] = field(default_factory=dict)  # name -> offset
    local_bytes: int = 0
    module_variables: dict[str, bytearray] = field(default_factory=dict)
    required_threads: int = 0

    @property
    def dynamic_shared_offset(self) -> int:
        """Where dynamic shared memory starts."""
        return align(self.static_shared, 128)


def align(value: int, to: int) -> int:
    """The next multiple of `to`."""
    return -(-value // to) * to


def as_tuple(operand: Operand) -> tuple[Any, ...]:
    """A vector's elements, or the operand alone."""
    return operand if isinstance(operand, tuple) else (operand,)
