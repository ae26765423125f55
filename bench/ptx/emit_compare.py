"""Code of comparison and selection."""

from __future__ import annotations

from .classify import np_code
from .emitter import ARRAY, Emitter
from .isa import Imm, Instr, Operand, Reg

_EXACT = {  # true of ordered operands alone
    **{"eq": "==", "lt": "<", "le": "<=", "gt": ">", "ge": ">="},
    **{"lo": "<", "ls": "<=", "hi": ">", "hs": ">="},
}
_INVERSE = {"ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}  # true of unordered operands as well
_BOOLEAN = {"and": "&", "or": "|", "xor": "^"}


def _comparison(name: str, a: str, b: str, is_float: bool) -> str:
    if name == "ne" and not is_float:
        return f"{a} != {b}"
    if name in _EXACT:
        return f"{a} {_EXACT[name]} {b}"
    if name in _INVERSE:
        return f"~({a} {_INVERSE[name]} {b})"
    return {
        "ne": f"({a} < {b}) | ({a} > {b})",
        "neu": f"{a} != {b}",
        "equ": f"~(({a} < {b}) | ({a} > {b}))",
        "num": f"({a} == {a}) & ({b} == {b})",
        "nan": f"({a} != {a}) | ({b} != {b})",
    }[name]


class Compare(Emitter):
    """op_<opcode> for each opcode."""

    def _compare(self, name: str, type_: str, sources: list[Operand], flush: bool = False) -> str:
        a, b = (self._numbers(source, type_) for source in sources[:2])
        if flush:
            a, b = f"ftz({a})", f"ftz({b})"
        return _comparison(name, a, b, type_.startswith(("f", "bf")))

    def _numbers(self, source: Operand, type_: str) -> str:
        """An operand as numbers: halves as floating point, packed ones unpacked."""
        if type_ in ("f16", "bf16"):
            bits = self.get(source, "u2")
        elif type_ in ("f16x2", "bf16x2"):
            bits = f"{self.array(source, 'u4')}.view(u2)"
        else:
            return self.get(source, np_code(type_))
        return f"bf2f({bits})" if type_[0] == "b" else f"{bits}.view(f2)"

    def op_setp(self, instr: Instr) -> None:
        type_, name, target = instr.dtype, instr.parts[1], instr.ops[0]
        if type_ in ("f16x2", "bf16x2") and isinstance(target, tuple):
            both = self.temporary(f"({self._compare(name, type_, instr.ops[1:3])}).reshape(-1, 2)")
            for i, predicate in enumerate(target):
                self.put(instr, predicate, f"{both}[:, {i}].copy()", "b")
            return
        result = self._compare(name, type_, instr.ops[1:3], instr.has("ftz"))
        operator = next((_BOOLEAN[part] for part in instr.parts[2:] if part in _BOOLEAN), "")
        also = f" {operator} {self.get(instr.ops[3], 'b')}" if operator else ""
        if isinstance(target, tuple):
            result = self.temporary(f"S.full({result}, bool)")
            self.put(instr, target[0], f"{result}{also}", "b")
            self.put(instr, target[1], f"~{result}{also}", "b")
        else:
            self.result(instr, f"({result}){also}", "b", *instr.ops[1:])

    def op_set(self, instr: Instr) -> None:
        to, type_, sources = instr.parts[-2], instr.dtype, instr.ops[1:]
        result = self._compare(instr.parts[1], type_, sources)
        if type_ in ("f16x2", "bf16x2"):
            one = {"f16x2": 0x3C00, "bf16x2": 0x3F80}.get(to, 0xFFFF)
            self.result(instr, f"where({result}, u2({one}), u2(0)).view(u4)", "u4", ARRAY)
        elif to == "f32":
            self.result(instr, f"where({result}, f4(1), f4(0))", "f4", *sources)
        else:
            self.result(instr, f"where({result}, u4(0xFFFFFFFF), u4(0))", "u4", *sources)

    def op_selp(self, instr: Instr) -> None:
        code = "u" + np_code(instr.dtype)[1]
        # what is held as floating point stays so, where no reinterpretation is needed
        if all(self._is_held_as_float(source, code[1]) for source in instr.ops[1:3]):
            code = "f" + code[1]
        a, b = (self.get(source, code) for source in instr.ops[1:3])
        self.result(instr, f"where({self.get(instr.ops[3], 'b')}, {a}, {b})", code, ARRAY)

    def _is_held_as_float(self, source: Operand, width: str) -> bool:
        if isinstance(source, Reg):
            return self.code_of.get(source.index) == "f" + width
        return isinstance(source, Imm) and source.float_size > 0

    def op_slct(self, instr: Instr) -> None:
        code = "u" + np_code(instr.parts[-2])[1]
        a, b = (self.get(source, code) for source in instr.ops[1:3])
        choice = self.array(instr.ops[3], np_code(instr.dtype))
        self.result(instr, f"where({choice} >= 0, {a}, {b})", code, ARRAY)

    def op_testp(self, instr: Instr) -> None:
        test = {
            "finite": "np.isfinite({0})",
            "infinite": "np.isinf({0})",
            "number": "~np.isnan({0})",
            "notanumber": "np.isnan({0})",
            "normal": "(np.isfinite({0}) & (np.abs({0}) >= SMALLEST_NORMAL))",
            "subnormal": "(({0} != 0) & (np.abs({0}) < SMALLEST_NORMAL))",
        }[instr.parts[1]]
        self.result(instr, test.format(self.get(instr.ops[1], np_code(instr.dtype))), "b", instr.ops[1])
