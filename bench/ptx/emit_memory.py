"""Code of loads, stores, cp.async, atomics, barriers and branches."""

from __future__ import annotations

from .blocks import EXIT
from .classify import np_code
from .emitter import Emitter
from .isa import SINK, TYPE_SIZE, UNSIGNED, Addr, Imm, Instr, Operand, Reg, Sym, as_tuple

_ATOMIC = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
_BITWISE = {"and": "np.bitwise_and", "or": "np.bitwise_or", "xor": "np.bitwise_xor"}
_UPDATE = {
    "exch": "lambda old, value: value",
    "cas": "lambda old, expected, value: where(old == expected, value, old)",
    "inc": "lambda old, value: where(old >= value, u4(0), old + u4(1))",
    "dec": "lambda old, value: where((old == 0) | (old > value), value, old - u4(1))",
}


def _vector(instr: Instr) -> int:
    return next((int(part[1:]) for part in instr.parts if part in ("v2", "v4", "v8")), 1)


class MemoryAccess(Emitter):
    """op_<opcode> for each opcode."""

    def op_ld(self, instr: Instr) -> None:
        address = instr.operand(1, Addr)  # a cache policy may follow
        width, count = TYPE_SIZE[instr.dtype], _vector(instr)
        if instr.space == "param":
            name = address.base.name if isinstance(address.base, Sym) else str(address.base)
            parts = [f"S.param({name!r}, {address.offset + i * width}, {width})" for i in range(count)]
            values = self.temporary(f"[{', '.join(parts)}]")
        else:
            space = "global" if instr.space == "const" else instr.space
            mask, location = self.mask(instr), self.address(address, space)
            values = self.temporary(f"M.load_{space}({instr.index}, {location}, {width}, {count}, {mask})")
        for i, target in enumerate(as_tuple(instr.ops[0])):
            value, code = f"{values}[{i}]", UNSIGNED[width]
            if instr.dtype[0] == "s" and isinstance(target, Reg) and target.storage[1] != str(width):
                code = "i" + target.storage[1]
                value = f"{value}.view(i{width}).astype({code})"
            self.put(instr, target, value, code)

    def op_st(self, instr: Instr) -> None:
        space = "global" if instr.space == "const" else instr.space
        if space == "param":  # arguments of a call that does nothing here
            return
        width = TYPE_SIZE[instr.dtype]
        mask, location = self.mask(instr), self.address(instr.operand(0, Addr), space)
        values = ", ".join(self._stored(source, width) for source in as_tuple(instr.ops[1]))
        self.emit(f"M.store_{space}({instr.index}, {location}, {width}, [{values}], {mask})")

    def _stored(self, source: Operand, width: int) -> str:
        if isinstance(source, Reg) and int(source.storage[1]) > width:
            return f"{self.register(source.index, source.storage)}.astype({UNSIGNED[width]})"
        return self.array(source, UNSIGNED[width])

    def op_cp(self, instr: Instr) -> None:
        if instr.parts[1] != "async":
            raise NotImplementedError("unknown instruction")
        mask = self.mask(instr)
        if instr.has("commit_group"):
            self.emit(f"M.commit_group({mask})")
        elif instr.has("wait_group"):
            self.emit(f"M.wait_group({instr.operand(0, Imm).value}, {mask})")
        elif instr.has("wait_all"):
            self.emit(f"M.wait_group(None, {mask})")
        elif instr.has("global"):
            target = self.address(instr.operand(0, Addr), "shared")
            source = self.address(instr.operand(1, Addr), "global")
            size = instr.operand(2, Imm).value
            given = self._source_bytes(instr, size)
            self.emit(f"M.copy_async({instr.index}, {target}, {source}, {size}, {given}, {mask})")
        else:
            raise NotImplementedError("cp.async variant")

    def _source_bytes(self, instr: Instr, size: int) -> str:
        """The optional count of bytes to read, or the optional predicate that reads none."""
        operand = instr.ops[3] if len(instr.ops) > 3 else None
        if operand is None or (isinstance(operand, Reg) and operand.storage == "u8"):  # a cache policy
            return "None"
        if isinstance(operand, Reg) and operand.storage == "b":
            return f"where({self.get(operand, 'b')}, u4(0), u4({size}))"
        return self.get(operand, "u4")

    def op_atom(self, instr: Instr) -> None:
        self._atomic(instr, instr.ops[0], instr.operand(1, Addr), instr.ops[2:])

    def op_red(self, instr: Instr) -> None:
        self._atomic(instr, SINK, instr.operand(0, Addr), instr.ops[1:])

    def _atomic(self, instr: Instr, target: Operand, address: Addr, values: list[Operand]) -> None:
        if _vector(instr) > 1:
            raise NotImplementedError("vector atomics")
        space = "shared" if any(part.startswith("shared") for part in instr.parts) else "global"
        name = next(part for part in instr.parts[1:] if part in _ATOMIC)
        width = TYPE_SIZE[instr.dtype]
        code = f"u{width}"
        mask = self.mask(instr)
        sources = ", ".join(self.array(value, code) for value in values[: 2 if name == "cas" else 1])
        update = _UPDATE.get(name) or self._update(instr.dtype, name, code)
        location = self.address(address, space)
        call = f"M.atomic({instr.index}, {space!r}, {location}, {width}, {update}, [{sources}], {mask})"
        if target is SINK:
            self.emit(call)
        else:
            self.put(instr, target, call, code)

    @staticmethod
    def _update(type_: str, name: str, code: str) -> str:
        """Source of a function (old, value) -> new, all bits."""
        number = np_code(type_)
        is_float = type_.startswith(("f", "bf"))
        function = _BITWISE.get(name) or {
            "add": "np.add",
            "min": "np.fmin" if is_float else "np.minimum",
            "max": "np.fmax" if is_float else "np.maximum",
        }.get(name)
        if type_ in ("f16", "f16x2", "bf16", "bf16x2"):
            helper = "bf_bin" if type_.startswith("bf") else "h_bin"
            return f"lambda old, value: {helper}({function}, old.view(u2), value.view(u2)).view({code})"
        return f"lambda old, value: {function}(old.view({number}), value.view({number})).view({code})"


class Control(Emitter):
    """Barriers, branches, and what needs no code."""

    def op_bar(self, instr: Instr) -> None:
        """The executor does the waiting: a barrier ends its block."""
        if instr.has("warp"):
            return
        if instr.has("red"):
            raise NotImplementedError("bar.red")
        if len(instr.ops) > 1 and instr.operand(1, Imm).value != self.kernel.required_threads:
            raise NotImplementedError("barrier of part of the CTA")
        if instr.guard:
            raise NotImplementedError("predicated barrier")

    op_barrier = op_bar

    def _nothing(self, instr: Instr) -> None:
        """Ordering and hints: memory is sequentially consistent here, and has no cache."""

    op_membar = op_fence = op_nanosleep = op_prefetch = op_discard = op_applypriority = _nothing
    op_griddepcontrol = _nothing

    def op_createpolicy(self, instr: Instr) -> None:
        self.put(instr, instr.ops[0], "u8(0)", "u8", scalar=True)

    def op_bra(self, instr: Instr) -> None:
        taken, other = self.block.target, self.block.next
        if instr.guard is None:
            self.exit_line = f"return {taken}"
            return
        self.emit(f"p = {self.predicate(instr)}")
        self.exit_line = f"return (p, {taken}, {other})"
        if not self.masked:
            uniform = f"{taken} if n == S.lanes else {other} if n == 0 else (p, {taken}, {other})"
            self.exit_line = f"n = np.count_nonzero(p)\n    return {uniform}"

    def op_ret(self, instr: Instr) -> None:
        if instr.guard is None:
            self.exit_line = f"return {EXIT}"
        else:
            self.exit_line = f"return ({self.predicate(instr)}, {EXIT}, {self.block.next})"

    op_exit = op_ret

    def op_trap(self, instr: Instr) -> None:
        self.emit(f"S.trap({instr.index}, {self.mask(instr)})")

    def op_call(self, instr: Instr) -> None:
        name = next(operand.name for operand in instr.ops if isinstance(operand, Sym))
        if name == "__assertfail":
            self.emit(f"S.trap({instr.index}, {self.mask(instr)}, 'device assertion failed')")
        elif name != "vprintf":
            raise NotImplementedError(f"call of {name}")
