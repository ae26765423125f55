"""The ground of the code generator: registers as local variables, constants, masks, assignment."""

from __future__ import annotations

import struct
from typing import Any

from . import floats
from .blocks import Block
from .isa import SINK, Addr, Imm, Instr, Kernel, Not, Operand, Reg, Special, Sym

# stands for an operand that is an array: the result needs no broadcast
ARRAY = Special("array")


class Constants:
    """The names that generated code of one kernel refers to."""

    def __init__(self, variables: dict[str, int]) -> None:
        self.values: dict[str, Any] = {}
        self.variables = variables  # addresses of module-level variables

    def scalar(self, value: float, code: str) -> str:
        """Name of a numpy scalar."""
        if code == "b":
            return "True" if value else "False"
        if code[0] == "f":
            name = f"K{code}_{len(self.values)}"
        else:
            bits = int(code[1]) * 8
            value = int(value) & (1 << bits) - 1
            if code[0] == "i" and value >> bits - 1:
                value -= 1 << bits
            name = f"K{code}_{value}".replace("-", "m")
        self.values[name] = getattr(floats, code)(value)
        return name


class Emitter:
    """Code of one block, line by line.

    A register is a local variable `v<index>`; `code_of` says as which numpy type it is held at present,
    and `views` which reinterpretations of it exist already.
    """

    def __init__(self, kernel: Kernel, constants: Constants, block: Block, masked: bool) -> None:
        self.kernel, self.constants, self.block, self.masked = kernel, constants, block, masked
        self.lines: list[str] = []
        self.code_of: dict[int, str] = {}
        self.views: dict[tuple[int, str], str] = {}
        self.assigned: set[int] = set()
        self.temporaries = 0
        self.exit_line = f"return {block.next}"

    def emit(self, line: str) -> None:
        """Append a line."""
        self.lines.append("    " + line)

    def temporary(self, expression: str | None = None) -> str:
        """A fresh name, given a value if there is one."""
        self.temporaries += 1
        name = f"t{self.temporaries}"
        if expression is not None:
            self.emit(f"{name} = {expression}")
        return name

    def store_registers(self) -> None:
        """Write back what later blocks read."""
        for index in sorted(self.assigned & self.block.live_out):
            self.emit(f"R[{index}] = {self.register(index, self.kernel.registers[index])}")

    def register(self, index: int, code: str) -> str:
        """Expression of a register viewed as numpy code `code`."""
        if index not in self.code_of:
            self.emit(f"v{index} = R[{index}]")
            self.code_of[index] = self.kernel.registers[index]
        held = self.code_of[index]
        if held == code:
            return f"v{index}"
        if code == "b" or held == "b" or held[1] != code[1]:
            raise NotImplementedError(f"register of {held} read as {code}")
        if (index, code) not in self.views:
            self.views[index, code] = name = f"v{index}_{code}"
            self.emit(f"{name} = v{index}.view({code})")
        return self.views[index, code]

    def get(self, operand: Operand, code: str) -> str:
        """Operand as an expression of numpy code `code`: an array or a numpy scalar."""
        if isinstance(operand, Reg):
            if "b" not in (operand.storage, code) and operand.storage[1] != code[1]:
                # a register of another width: truncated or zero-extended
                resized = f"{self.register(operand.index, operand.storage)}.astype(u{code[1]})"
                return resized if code[0] == "u" else f"{resized}.view({code})"
            return self.register(operand.index, code)
        if isinstance(operand, Not):
            return f"~{self.register(operand.reg.index, 'b')}"
        if isinstance(operand, Imm):
            return self._literal(operand, code)
        if isinstance(operand, Special):
            value = f"S.special({operand.name!r})"
            return value if code == "u4" else f"{value}.astype({code})"
        if isinstance(operand, Sym):
            return self.constants.scalar(self.symbol(operand.name), code)
        raise NotImplementedError(f"operand {operand}")

    def _literal(self, literal: Imm, code: str) -> str:
        if code[0] != "f":
            value = literal.value
            if literal.float_size == 8 and code[1] == "4":
                value = struct.unpack("<I", struct.pack("<f", _double(value)))[0]
            return self.constants.scalar(value, code)
        if literal.float_size == 0:
            return self.constants.scalar(float(literal.value), code)
        if literal.float_size == 4:
            number: float = struct.unpack("<f", struct.pack("<I", literal.value))[0]
        else:
            number = _double(literal.value)
        if number != number:  # its payload must survive
            return f"{self.constants.scalar(literal.value, f'u{code[1]}')}.view({code})"
        return self.constants.scalar(number, code)

    def array(self, operand: Operand, code: str) -> str:
        """As `get`, broadcast to all lanes."""
        value = self.get(operand, code)
        return f"S.full({value}, {code if code != 'b' else 'bool'})" if self.is_scalar(operand) else value

    @staticmethod
    def is_scalar(*operands: Operand) -> bool:
        """Whether an expression of these operands is a scalar."""
        return not any(isinstance(operand, Reg | Not | Special) for operand in operands)

    def symbol(self, name: str) -> int:
        """Address of a variable in its space."""
        if name in self.kernel.shared:
            offset = self.kernel.shared[name]
            return self.kernel.dynamic_shared_offset if offset is None else offset
        if name in self.kernel.local:
            return self.kernel.local[name]
        if name in self.constants.variables:
            return self.constants.variables[name]
        raise NotImplementedError(f"symbol {name}")

    def address(self, address: Addr, space: str) -> str:
        """Byte address of every lane."""
        base, code = address.base, "u8" if space == "global" else "u4"
        if isinstance(base, Imm | Sym):
            start = base.value if isinstance(base, Imm) else self.symbol(base.name)
            return f"S.full({self.constants.scalar(start + address.offset, code)}, {code})"
        if not isinstance(base, Reg):
            raise NotImplementedError("address of an argument")
        expression = self.register(base.index, base.storage)
        if base.storage != code:
            expression += f".astype({code})"
        if address.offset:
            expression += f" + {self.constants.scalar(address.offset, code)}"
        return expression

    def mask(self, instr: Instr) -> str | None:
        """Name of the mask of the lanes that execute an instruction, or None for all."""
        if instr.guard is None:
            return "m" if self.masked else None
        predicate, negated = instr.guard
        expression = ("~" if negated else "") + self.register(predicate.index, "b")
        if self.masked:
            return self.temporary(f"{expression} & m")
        return self.temporary(expression) if negated else expression

    def predicate(self, instr: Instr) -> str:
        """Expression of an instruction's guard."""
        if instr.guard is None:
            raise NotImplementedError("a guard is needed")
        register, negated = instr.guard
        return ("~" if negated else "") + self.register(register.index, "b")

    def put(self, instr: Instr, target: Operand, expression: str, code: str, scalar: bool = False) -> None:
        """Assign an expression of numpy code `code` under the instruction's mask; `scalar`: broadcast it."""
        if target is SINK:
            return
        if not isinstance(target, Reg):
            raise NotImplementedError("destination")
        index = target.index
        if target.storage != "b" and target.storage[1] != code[1]:
            # narrower or wider than the register: zero-extended or truncated
            view = "" if code[0] == "u" else f".view(u{code[1]})"
            expression = f"({expression}){view}.astype({target.storage})"
            code = target.storage
        mask = self.mask(instr)
        if scalar:
            expression = f"S.full({expression}, {code if code != 'b' else 'bool'})"
        if mask is not None:
            expression = f"where({mask}, {expression}, {self.register(index, code)})"
        self.emit(f"v{index} = {expression}")
        self.code_of[index] = code
        self.assigned.add(index)
        for key in [key for key in self.views if key[0] == index]:
            del self.views[key]

    def result(self, instr: Instr, expression: str, code: str, *sources: Operand) -> None:
        """Assign to the first operand; `sources` are what the expression is made of."""
        self.put(instr, instr.ops[0], expression, code, scalar=self.is_scalar(*sources))


def _double(bits: int) -> float:
    value: float = struct.unpack("<d", struct.pack("<Q", bits))[0]
    return value
