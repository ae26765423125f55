"""PTX text -> Kernel: parameters, registers, variables, instructions, labels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .isa import (
    SINK,
    STORAGE,
    TYPE_SIZE,
    Addr,
    Imm,
    Instr,
    Kernel,
    Not,
    Operand,
    Param,
    Reg,
    Slot,
    Special,
    Sym,
)
from .lexer import clean, declare, is_special, matched, number, split

_LABEL = re.compile(r"([$\w]+)\s*:(?!:)")
_ENTRY = re.compile(r"(?:\.visible\s+)?\.entry\s+([$\w]+)\s*(\(([^)]*)\))?([^{]*)\{")
_FUNCTION = re.compile(r"\.func\s*(?:\(([^)]*)\))?\s*([$\w]+)\s*\(([^)]*)\)[^;{]*\{")
_VARIABLE = re.compile(r"^\s*((?:\.\w+\s+)*\.(?:shared|global|const)\b[^;(]*);", re.MULTILINE)
_MAX_CALL_DEPTH = 16


def parse(text: str) -> Kernel:
    """The first entry of the text, with the functions that it calls expanded in place.

    Raises:
        ValueError: there is no .entry.
        NotImplementedError: a form of address, declaration or call that is not supported.
    """
    text, locations = clean(text)
    entry = _ENTRY.search(text)
    if entry is None:
        raise ValueError("no .entry in the PTX text")
    kernel = Kernel(entry.group(1), [_param(param) for param in split(entry.group(3) or "")])
    threads = re.search(r"\.reqntid\s+(\d+)", entry.group(4) or "")
    kernel.required_threads = int(threads.group(1)) if threads else 0
    for declaration in _VARIABLE.finditer(text[: entry.start()]):
        declare(kernel, declaration.group(1))
    functions = {
        match.group(2): _Function(_names(match.group(1)), _names(match.group(3)), match.end())
        for match in _FUNCTION.finditer(text)
    }
    _Body(kernel, text, locations, functions).parse(entry.end())
    return kernel


def _param(text: str) -> Param:
    type_, rest = matched(r"(?s)^\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(.*)", text).groups()
    name = rest.split()[-1]
    array = re.match(r"([$\w]+)\[(\d+)\]", name)
    if array:
        return Param(array.group(1), type_, int(array.group(2)) * TYPE_SIZE[type_])
    return Param(name, type_, TYPE_SIZE[type_])


def _names(params: str | None) -> list[str]:
    return [re.sub(r"\[.*", "", param.split()[-1]) for param in split(params or "")]


@dataclass(frozen=True)
class _Function:
    """A device function: names of results and parameters, and where its body starts."""

    results: list[str]
    params: list[str]
    start: int


class _Body:
    """Parses the body of the entry, or of a function that is expanded into it.

    `scope` maps the function's parameters to the caller's Slots, and `end_label` is where a `ret` goes.
    """

    def __init__(
        self,
        kernel: Kernel,
        text: str,
        locations: dict[int, str],
        functions: dict[str, _Function],
        scope: dict[str, Reg | Slot] | None = None,
        end_label: str = "",
        depth: int = 0,
    ) -> None:
        self.kernel, self.text, self.locations, self.functions = kernel, text, locations, functions
        self.scopes: list[dict[str, Reg | Slot]] = [scope or {}]
        self.end_label = end_label
        self.label_suffix = "@" + end_label if end_label else ""  # keeps labels apart
        self.depth = depth

    def parse(self, position: int) -> None:
        """From after the opening brace to the closing one."""
        text = self.text
        line = text.count("\n", 0, position) + 1
        while position < len(text):
            char = text[position]
            if char in " \t\r\n":
                line += char == "\n"
                position += 1
            elif char == "{":
                self.scopes.append({})
                position += 1
            elif char == "}":
                self.scopes.pop()
                position += 1
                if not self.scopes:
                    break
            elif label := _LABEL.match(text, position):
                self.kernel.labels[label.group(1) + self.label_suffix] = len(self.kernel.instrs)
                position = label.end()
            else:
                end = text.index(";", position)
                raw = text[position:end]
                try:
                    self._statement(" ".join(raw.split()), line)
                except (NotImplementedError, ValueError) as error:
                    raise type(error)(f"line {line}: {' '.join(raw.split())}: {error}") from None
                line += raw.count("\n")
                position = end + 1

    def _statement(self, text: str, line: int) -> None:
        if text.startswith(".reg"):
            self._registers(text)
        elif text.startswith((".local", ".shared")):
            declare(self.kernel, text)
        elif text.startswith(".param"):
            self.scopes[-1][re.sub(r"\[.*", "", text.split()[-1])] = Slot()
        elif not text.startswith("."):
            self._instruction(text, line)

    def _registers(self, text: str) -> None:
        _, type_, names = text.split(None, 2)
        storage = STORAGE[type_.lstrip(".")]
        for name in names.split(","):
            base, count = matched(r"^([%$\w]+)(?:<(\d+)>)?$", name.strip()).groups()
            for register in [base] if count is None else [f"{base}{i}" for i in range(int(count))]:
                self.scopes[-1][register] = self._new_register(storage)

    def _new_register(self, storage: str) -> Reg:
        self.kernel.registers.append(storage)
        return Reg(len(self.kernel.registers) - 1, storage)

    def _operand(self, text: str) -> Operand:
        if text[0] in "{(":
            return tuple(self._operand(part) for part in split(text[1:-1]))
        if text[0] == "[":
            return self._address(text[1:-1].strip())
        if text == "_":
            return SINK
        if "|" in text:
            return tuple(self._operand(part.strip()) for part in text.split("|"))
        if text[0] == "!":
            return Not(self._predicate(text[1:].strip()))
        for scope in reversed(self.scopes):
            if text in scope:
                return scope[text]
        if is_special(text):
            return Special(text[1:])
        literal = number(text)
        if literal is not None:
            return literal
        if text[0] == "%":
            raise ValueError(f"undeclared register {text}")
        return Sym(text)

    def _address(self, inner: str) -> Operand:
        if inner.startswith("{") or "," in inner:
            return tuple(self._operand(part) for part in split(inner))
        match = re.match(r"([%$\w.]+)\s*(?:([+-])\s*([-+]?\w+))?$", inner)
        if not match:
            raise NotImplementedError(f"address [{inner}]")
        name, sign, distance = match.groups()
        literal = number(distance) if distance else Imm(0)
        base = self._operand(name)
        if literal is None or not isinstance(base, Reg | Imm | Sym | Slot):
            raise NotImplementedError(f"address [{inner}]")
        return Addr(base, -literal.value if sign == "-" else literal.value)

    def _predicate(self, text: str) -> Reg:
        operand = self._operand(text)
        if not isinstance(operand, Reg):
            raise NotImplementedError(f"predicate {text}")
        return operand

    def _instruction(self, text: str, line: int) -> None:
        guard, body = None, text
        match = re.match(r"@(!?)\s*(%?[\w$]+)\s+(.*)", text)
        if match:
            guard, body = (self._predicate(match.group(2)), match.group(1) == "!"), match.group(3)
        opcode, _, rest = body.partition(" ")
        parts = tuple(opcode.replace("::", "_").split("."))
        ops = [self._operand(part) for part in split(rest)]
        instr = Instr(parts, ops, guard, line, text, self.locations.get(line, ""))
        callee = next((op.name for op in ops if isinstance(op, Sym)), "") if parts[0] == "call" else ""
        if callee in self.functions:
            self._expand_call(instr, callee)
        elif parts[0] == "ret" and self.end_label:
            self._emit(replace(instr, parts=("bra",), ops=[Sym(self.end_label)]))
        elif parts[0] == "bra":
            self._emit(replace(instr, ops=[Sym(instr.operand(0, Sym).name + self.label_suffix)]))
        elif parts[0] in ("ld", "st") and any(
            isinstance(op, Addr) and isinstance(op.base, Slot) for op in ops
        ):
            self._move_argument(instr)
        else:
            self._emit(instr)

    def _emit(self, instr: Instr) -> None:
        instr.index = len(self.kernel.instrs)
        self.kernel.instrs.append(instr)

    def _expand_call(self, instr: Instr, callee: str) -> None:
        if self.depth > _MAX_CALL_DEPTH or instr.guard:
            raise NotImplementedError("recursive or predicated call")
        function = self.functions[callee]
        at = instr.ops.index(Sym(callee))
        results = _slots(function.results, instr.ops[0] if at else ())
        params = _slots(function.params, instr.ops[at + 1] if at + 1 < len(instr.ops) else ())
        end_label = f"{callee}{len(self.kernel.instrs)}"
        body = _Body(
            self.kernel,
            self.text,
            self.locations,
            self.functions,
            results | params,
            end_label,
            self.depth + 1,
        )
        body.parse(function.start)
        self.kernel.labels[end_label] = len(self.kernel.instrs)

    def _move_argument(self, instr: Instr) -> None:
        """ld.param / st.param of a call sequence: a move between registers."""
        store = instr.op == "st"
        address, value = instr.ops if store else instr.ops[::-1]
        if not isinstance(address, Addr) or not isinstance(address.base, Slot):
            raise NotImplementedError("argument of a call")
        for i, element in enumerate(value if isinstance(value, tuple) else (value,)):
            offset = address.offset + i * TYPE_SIZE[instr.dtype]
            register = address.base.regs.get(offset)
            if register is None:
                register = address.base.regs[offset] = self._new_register(STORAGE[instr.dtype])
            ops = [register, element] if store else [element, register]
            self._emit(replace(instr, parts=("mov", instr.dtype), ops=ops))


def _slots(names: Sequence[str], given: Operand) -> dict[str, Reg | Slot]:
    values = given if isinstance(given, tuple) else ()
    return dict(zip(names, values, strict=False))
