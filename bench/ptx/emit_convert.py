"""Code of mov and cvt."""

from __future__ import annotations

from .classify import np_code
from .emitter import ARRAY, Emitter
from .isa import TYPE_SIZE, UNSIGNED, Imm, Instr, Operand, Reg

_ROUNDING = ("rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi")
_MODIFIERS = {"ftz", "sat", "satfinite", "approx", "full", "relu", *_ROUNDING}
_TO_INTEGRAL = {"rni": "np.rint", "rzi": "np.trunc", "rmi": "np.floor", "rpi": "np.ceil"}
_BYTE = {"u8": "u1", "s8": "i1", "b8": "u1"}


class Convert(Emitter):
    """op_<opcode> for each opcode."""

    def op_mov(self, instr: Instr) -> None:
        target, source = instr.ops
        if isinstance(target, tuple):
            self._unpack(instr, target, source)
            return
        if isinstance(source, tuple):
            width = TYPE_SIZE[instr.dtype] // len(source)
            elements = ", ".join(self.array(element, UNSIGNED[width]) for element in source)
            packed = f"u{width * len(source)}"
            self.put(instr, target, f"np.stack([{elements}], 1).view({packed}).ravel()", packed)
            return
        code = np_code(instr.dtype)
        if code[0] in "fi":
            code = "u" + code[1]
        if isinstance(source, Reg) and isinstance(target, Reg) and source.storage == target.storage:
            code = self.code_of.get(source.index, source.storage)
        if isinstance(source, Imm) and source.float_size == 0 and instr.dtype in ("f32", "f64"):
            raise NotImplementedError("integer literal for a float")
        self.result(instr, self.get(source, code), code, source)

    def _unpack(self, instr: Instr, target: tuple[Operand, ...], source: Operand) -> None:
        count = len(target)
        width = TYPE_SIZE[instr.dtype] // count
        value = self.get(source, f"u{width * count}")
        parts = self.temporary(f"{value}.view({UNSIGNED[width]}).reshape(-1, {count})")
        for i, element in enumerate(target):
            self.put(instr, element, f"{parts}[:, {i}].copy()", UNSIGNED[width])

    def op_cvta(self, instr: Instr) -> None:
        self.result(instr, self.get(instr.ops[1], "u8"), "u8", instr.ops[1])

    def op_cvt(self, instr: Instr) -> None:
        to, given = [part for part in instr.parts[1:] if part not in _MODIFIERS][:2]
        mode = next((part for part in instr.parts if part in _ROUNDING), "rn")
        packed = self._convert_packed(instr, to, given, mode)
        if packed:
            self.result(instr, packed, "u2" if to in ("e4m3x2", "e5m2x2") else "u4", ARRAY)
            return
        if to == "tf32":
            function = "rna_tf32" if mode == "rna" else "rn_tf32"
            self.result(instr, f"{function}({self.array(instr.ops[1], 'f4')})", "u4", ARRAY)
            return
        from_float = given[0] == "f" or given == "bf16"
        value = self._source(instr.ops[1], given)
        if instr.has("ftz") and from_float:
            value = f"ftz({value})"
        if to[0] == "f" or to == "bf16":
            self.result(instr, self._to_float(instr, value, to, given, mode), np_code(to), ARRAY)
        else:
            self.result(instr, *self._to_integer(instr, value, to, from_float, mode), ARRAY)

    def _convert_packed(self, instr: Instr, to: str, given: str, mode: str) -> str:
        """Expression of a conversion to or from a pair, or nothing if it is none."""

        def relu(value: str) -> str:
            return f"relu({value})" if instr.has("relu") else value

        sources = instr.ops[1:]
        if to in ("bf16x2", "f16x2") and given == "f32":
            high, low = (relu(self.array(source, "f4")) for source in sources)
            if to == "bf16x2" and mode == "rn":
                return f"(bf_round({high}) & u4(0xFFFF0000)) | (bf_round({low}) >> 16)"
            function = "f2bf" if to == "bf16x2" else "f2h"
            high, low = (f"{function}({half}, {mode!r}).astype(u4)" for half in (high, low))
            return f"({high} << 16) | {low}"
        if to in ("e4m3x2", "e5m2x2"):
            kind = to[:4]
            if given == "f32":
                high, low = (f"to_fp8({relu(self.array(source, 'f4'))}, {kind!r})" for source in sources)
                return f"({high}.astype(u2) << 8) | {low}"
            bits = self.array(sources[0], "u4")
            halves = {"f16x2": f"{bits}.view(f2).astype(f4)", "bf16x2": f"bf2f({bits}.view(u2))"}[given]
            return f"to_fp8({halves}, {kind!r}).view(u2)"
        if given in ("e4m3x2", "e5m2x2"):
            function = {"f16x2": "f2h", "bf16x2": "f2bf"}[to]
            decoded = f"{given[:4].upper()}[{self.array(sources[0], 'u2')}.view(u1)]"
            return f"{function}({relu(decoded)}).view(u4)"
        return ""

    def _source(self, source: Operand, given: str) -> str:
        """The operand as numbers: float32 for the halves."""
        code = np_code(given)
        if given in _BYTE:
            value = f"{self.array(source, 'u2')}.astype(u1)"
            return f"{value}.view(i1)" if given == "s8" else value
        if isinstance(source, Reg) and source.storage != "b" and source.storage[1] != code[1]:
            value = f"{self.register(source.index, source.storage)}.astype(u{code[1]}).view({code})"
        else:
            value = self.array(source, code)
        if given == "bf16":
            return f"bf2f({value})"
        return f"{value}.view(f2).astype(f4)" if given == "f16" else value

    @staticmethod
    def _to_float(instr: Instr, value: str, to: str, given: str, mode: str) -> str:
        from_float = given[0] == "f" or given == "bf16"
        if from_float and mode in _TO_INTEGRAL:
            value, mode = f"{_TO_INTEGRAL[mode]}({value})", "rn"
        if to in ("f16", "bf16"):
            if not from_float:
                value = f"{value}.astype({'f8' if to == 'f16' else 'f4'})"
            if instr.has("relu"):
                value = f"relu({value})"
            if to == "bf16" and given == "f64":
                value += ".astype(f4)"
            value = f"{'f2h' if to == 'f16' else 'f2bf'}({value}, {mode!r})"
        elif to == "f64":
            value = f"{value}.astype(f8)"
        elif not from_float or given == "f64":
            value = f"{value}.astype(f4)" if mode == "rn" else f"directed({value}.astype(f8), {mode!r})"
        if instr.has("sat"):
            value = f"sat01({value})"
        return f"ftz({value})" if instr.has("ftz") and to == "f32" else value

    @staticmethod
    def _to_integer(instr: Instr, value: str, to: str, from_float: bool, mode: str) -> tuple[str, str]:
        code = _BYTE.get(to) or np_code(to)
        if from_float:
            value = f"f2int({value}, {code}, {mode if mode in _TO_INTEGRAL else 'rzi'!r})"
        elif instr.has("sat"):
            value = f"sat_int({value}, {code})"
        else:
            value = f"{value}.astype({code})"
        # a destination wider than the type is extended by the type's sign
        target = instr.ops[0]
        width = target.storage[1] if isinstance(target, Reg) else code[1]
        if width != code[1]:
            value, code = f"{value}.astype({code[0]}{width})", code[0] + width
        return value, code
