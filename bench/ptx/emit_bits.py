"""Code of the logical, shift and bit-field instructions."""

from __future__ import annotations

from .classify import np_code
from .emitter import ARRAY, Emitter
from .integers import lop3_fn
from .isa import Imm, Instr, Reg


class Bits(Emitter):
    """op_<opcode> for each opcode."""

    def _logic(self, instr: Instr, symbol: str) -> None:
        code = np_code(instr.dtype)
        a, b = (self.get(source, code) for source in instr.ops[1:])
        self.result(instr, f"{a} {symbol} {b}", code, *instr.ops[1:])

    def op_and(self, instr: Instr) -> None:
        self._logic(instr, "&")

    def op_or(self, instr: Instr) -> None:
        self._logic(instr, "|")

    def op_xor(self, instr: Instr) -> None:
        self._logic(instr, "^")

    def op_not(self, instr: Instr) -> None:
        code = np_code(instr.dtype)
        self.result(instr, f"~{self.get(instr.ops[1], code)}", code, instr.ops[1])

    def op_cnot(self, instr: Instr) -> None:
        code = np_code(instr.dtype)
        self.result(instr, f"({self.get(instr.ops[1], code)} == 0).astype({code})", code, instr.ops[1])

    def _shift(self, instr: Instr, symbol: str) -> None:
        code = np_code(instr.dtype)
        bits = int(code[1]) * 8
        if code[0] != "i" or symbol == "<<":
            code = "u" + code[1]
        value, count = self.get(instr.ops[1], code), instr.ops[2]
        if isinstance(count, Imm):
            shift = count.value & 0xFFFFFFFF
            if shift < bits or code[0] == "i":
                result = f"{value} {symbol} {self.constants.scalar(min(shift, bits - 1), code)}"
            else:
                result = f"{value} & {self.constants.scalar(0, code)}"
        else:
            register = instr.operand(2, Reg)
            limit = self.constants.scalar(bits, register.storage)
            clamped = f"np.minimum({self.register(register.index, register.storage)}, {limit})"
            # numpy shifts by the full width give 0, and the sign for signed types, as PTX asks
            result = f"{value} {symbol} {clamped}.astype({code})"
        self.result(instr, result, code, *instr.ops[1:])

    def op_shl(self, instr: Instr) -> None:
        self._shift(instr, "<<")

    def op_shr(self, instr: Instr) -> None:
        self._shift(instr, ">>")

    def op_shf(self, instr: Instr) -> None:
        low, high, count = (self.array(source, "u4") for source in instr.ops[1:])
        how = f"{instr.parts[1] == 'l'}, {instr.has('wrap')}"
        self.result(instr, f"shf({low}, {high}, {count}, {how})", "u4", ARRAY)

    def op_bfe(self, instr: Instr) -> None:
        code = np_code(instr.dtype)
        bits = int(code[1]) * 8
        source, position, length = instr.ops[1:]
        if isinstance(position, Imm) and isinstance(length, Imm):
            left, right = bits - position.value - length.value, bits - length.value
            if left >= 0 and length.value > 0:  # a shift to the upper end and one back
                result = self.get(source, code)
                result = f"({result} << {self.constants.scalar(left, code)})" if left else result
                result = f"{result} >> {self.constants.scalar(right, code)}" if right else result
                self.result(instr, result, code, source)
                return
        unsigned = "u" + code[1]
        where = f"{self.get(position, 'u4')}, {self.get(length, 'u4')}"
        result = f"bfe({self.array(source, unsigned)}, {where}, {code[0] == 'i'}, {bits})"
        self.result(instr, result, unsigned, ARRAY)

    def op_bfi(self, instr: Instr) -> None:
        code = np_code(instr.dtype)
        a, b = (self.array(source, code) for source in instr.ops[1:3])
        where = f"{self.get(instr.ops[3], 'u4')}, {self.get(instr.ops[4], 'u4')}"
        self.result(instr, f"bfi({a}, {b}, {where}, {int(code[1]) * 8})", code, ARRAY)

    def op_lop3(self, instr: Instr) -> None:
        if "BOOL" in "".join(instr.parts) or isinstance(instr.ops[0], tuple):
            raise NotImplementedError("lop3 with a predicate")
        table = instr.operand(4, Imm).value & 0xFF
        self.constants.values[f"LOP{table}"] = lop3_fn(table)
        sources = instr.ops[1:4]
        arguments = ", ".join(self.get(source, "u4") for source in sources)
        self.result(instr, f"LOP{table}({arguments})", "u4", *sources)

    def op_prmt(self, instr: Instr) -> None:
        mode = instr.parts[2] if len(instr.parts) > 2 else ""
        a, b = (self.get(source, "u4") for source in instr.ops[1:3])
        selector = instr.ops[3]
        if isinstance(selector, Imm) and not mode:
            constant = selector.value & 0xFFFF
            self.result(instr, f"prmt_const({a}, {b}, {constant})", "u4", *instr.ops[1:3])
        else:
            result = f"prmt({a}, {b}, {self.get(selector, 'u4')}, {mode!r})"
            self.result(instr, result, "u4", *instr.ops[1:])

    def op_popc(self, instr: Instr) -> None:
        self.result(instr, f"popc({self.get(instr.ops[1], np_code(instr.dtype))})", "u4", instr.ops[1])

    def op_clz(self, instr: Instr) -> None:
        code = np_code(instr.dtype)
        self.result(instr, f"clz({self.array(instr.ops[1], code)}, {int(code[1]) * 8})", "u4", instr.ops[1])

    def op_bfind(self, instr: Instr) -> None:
        code = np_code(instr.dtype)
        bits = int(code[1]) * 8
        value = self.temporary(self.array(instr.ops[1], code))
        if code[0] == "i":
            value = self.temporary(f"where({value} < 0, ~{value}, {value}).view(u{code[1]})")
        zeros = f"clz({value}, {bits})"
        position = zeros if instr.has("shiftamt") else f"u4({bits - 1}) - {zeros}"
        self.result(instr, f"where({value} == 0, u4(0xFFFFFFFF), {position})", "u4", ARRAY)

    def op_brev(self, instr: Instr) -> None:
        self.result(instr, f"brev({self.get(instr.ops[1], 'u4')})", "u4", instr.ops[1])
