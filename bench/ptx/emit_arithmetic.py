"""Code of add, mul, fma, div, the functions, min and max: the floating-point types and the integers."""

from __future__ import annotations

from collections.abc import Callable

from .classify import np_code
from .emitter import ARRAY, Emitter
from .isa import TYPE_SIZE, Instr, Operand

_HALF = ("f16", "bf16", "f16x2", "bf16x2")
_DIRECTED = ("rz", "rm", "rp")


class Arithmetic(Emitter):
    """op_<opcode> for each opcode."""

    def _half(self, instr: Instr, expression: Callable[[str, list[str]], str]) -> None:
        """A result of half types: expression(prefix of the helper functions, operands)."""
        packed = instr.dtype.endswith("x2")
        sources = instr.ops[1:]
        code = "u4" if packed else "u2"
        values = [self.get(source, code) for source in sources]
        if packed:
            values = [
                f"np.array([{value}]).view(u2)[np.arange(2 * S.lanes) & 1]"
                if self.is_scalar(source)
                else f"{value}.view(u2)"
                for value, source in zip(values, sources, strict=True)
            ]
        prefix = "bf" if instr.dtype.startswith("bf") else "h"
        result = expression(prefix, values)
        if instr.has("relu"):
            result = f"{prefix}_un(relu, {result})"
        self.result(instr, f"({result}).view(u4)" if packed else result, code, *sources)

    def _float(
        self, instr: Instr, expression: Callable[..., str], half: Callable[[str, list[str]], str]
    ) -> None:
        """A floating-point result: expression(*operands) in f32 and f64, or `half` as in `_half`."""
        if instr.dtype in _HALF:
            self._half(instr, half)
            return
        code = np_code(instr.dtype)
        values = [self.get(source, code) for source in instr.ops[1:]]
        if instr.has("ftz"):
            result = f"ftz({expression(*[f'ftz({value})' for value in values])})"
        else:
            result = expression(*values)
        if instr.has("sat"):
            result = f"sat01({result})"
        self.result(instr, result, code, *instr.ops[1:])

    @staticmethod
    def _rounded(instr: Instr, nearest: str, exact: str) -> str:
        """`nearest`, or in a directed mode `exact`, a float64, rounded that way."""
        mode = next((part for part in instr.parts if part in _DIRECTED), None)
        return nearest if mode is None or instr.dtype != "f32" else f"directed({exact}, {mode!r})"

    def _float_binary(self, instr: Instr, symbol: str, function: str) -> None:
        self._float(
            instr,
            lambda a, b: self._rounded(instr, f"{a} {symbol} {b}", f"np.{function}({a}, {b}, dtype=f8)"),
            lambda prefix, v: f"{prefix}_bin(np.{function}, {v[0]}, {v[1]})",
        )

    def _integers(self, instr: Instr, code: str | None = None) -> list[str]:
        """The sources, as unsigned integers unless `code` is given."""
        code = code or "u" + np_code(instr.dtype)[1]
        return [self.get(source, code) for source in instr.ops[1:]]

    def _add_sub(self, instr: Instr, symbol: str, function: str) -> None:
        if instr.is_float:
            self._float_binary(instr, symbol, function)
            return
        if instr.dtype in ("u16x2", "s16x2"):
            raise NotImplementedError("packed 16-bit integers")
        sources = instr.ops[1:]
        if instr.has("sat"):
            a, b = self._integers(instr, "i4")
            exact = f"np.{function}({a}, {b}, dtype=i8)"
            self.result(instr, f"np.clip({exact}, -2**31, 2**31 - 1).astype(i4)", "i4", *sources)
            return
        code = "u" + np_code(instr.dtype)[1]
        a, b = self._integers(instr)
        result = f"{a} {symbol} {b}"
        if instr.has("cc"):
            result = self.temporary(result)
            self.emit(f"S.carry = {result} < {a}" if symbol == "+" else f"S.carry = {a} < {b}")
        self.result(instr, result, code, *sources)

    def op_add(self, instr: Instr) -> None:
        self._add_sub(instr, "+", "add")

    def op_sub(self, instr: Instr) -> None:
        self._add_sub(instr, "-", "subtract")

    def op_addc(self, instr: Instr) -> None:
        code = "u" + np_code(instr.dtype)[1]
        a, b = self._integers(instr)
        part = self.temporary(f"{a} + {b}")
        total = self.temporary(f"{part} + S.carry.astype({code})")
        if instr.has("cc"):
            self.emit(f"S.carry = ({part} < {a}) | ({total} < {part})")
        self.result(instr, total, code, *instr.ops[1:])

    def op_subc(self, instr: Instr) -> None:
        code = "u" + np_code(instr.dtype)[1]
        a, b = self._integers(instr)
        part = self.temporary(f"{a} - {b}")
        total = self.temporary(f"{part} - S.carry.astype({code})")
        if instr.has("cc"):
            self.emit(f"S.carry = ({a} < {b}) | ({total} > {part})")
        self.result(instr, total, code, *instr.ops[1:])

    def _product(self, instr: Instr, a: Operand, b: Operand) -> tuple[str, str]:
        """Integer product -> (expression, code)."""
        code = np_code(instr.dtype)
        bits = TYPE_SIZE[instr.dtype] * 8
        wide = f"{code[0]}{bits // 4}"
        if instr.has("wide"):
            return f"np.multiply({self.get(a, code)}, {self.get(b, code)}, dtype={wide})", wide
        if instr.has("hi") and bits == 64:
            return f"mulhi_{code}({self.get(a, 'u8')}, {self.get(b, 'u8')})", "u8"
        if instr.has("hi"):
            product = f"np.multiply({self.get(a, code)}, {self.get(b, code)}, dtype={wide})"
            return f"({product} >> {bits}).astype({code})", code
        code = "u" + code[1]
        return f"{self.get(a, code)} * {self.get(b, code)}", code

    def op_mul(self, instr: Instr) -> None:
        if instr.is_float:
            self._float_binary(instr, "*", "multiply")
        else:
            self.result(instr, *self._product(instr, instr.ops[1], instr.ops[2]), *instr.ops[1:])

    def op_mad(self, instr: Instr, carry_in: bool = False) -> None:
        if instr.is_float:
            self.op_fma(instr)
            return
        product, code = self._product(instr, instr.ops[1], instr.ops[2])
        unsigned = "u" + code[1]
        if code[0] == "i":
            convert = "astype" if self.is_scalar(*instr.ops[1:3]) else "view"
            product = f"({product}).{convert}({unsigned})"
        addend = self.get(instr.ops[3], unsigned)
        if not carry_in and not instr.has("cc"):
            self.result(instr, f"{product} + {addend}", unsigned, *instr.ops[1:])
            return
        product = self.temporary(product)
        part = self.temporary(f"{product} + {addend}")
        total = self.temporary(f"{part} + S.carry.astype({unsigned})") if carry_in else part
        if instr.has("cc"):
            self.emit(f"S.carry = ({part} < {product}) | ({total} < {part})")
        self.result(instr, total, unsigned, *instr.ops[1:])

    def op_madc(self, instr: Instr) -> None:
        self.op_mad(instr, carry_in=True)

    def op_fma(self, instr: Instr) -> None:
        def expression(a: str, b: str, c: str) -> str:
            if instr.dtype == "f64":
                return f"fma8({a}, {b}, {c})"
            return self._rounded(instr, f"fma4({a}, {b}, {c})", f"(np.multiply({a}, {b}, dtype=f8) + {c})")

        self._float(instr, expression, lambda prefix, v: f"{prefix}_fma({v[0]}, {v[1]}, {v[2]})")

    def _integer_division(self, instr: Instr, function: str) -> None:
        code = np_code(instr.dtype)
        a, b = (self.array(source, code) for source in instr.ops[1:])
        self.result(instr, f"{function}({a}, {b})", code, *instr.ops[1:])

    def op_div(self, instr: Instr) -> None:
        if not instr.is_float:
            self._integer_division(instr, "tdiv")
            return
        self._float(
            instr,
            lambda a, b: self._rounded(instr, f"{a} / {b}", f"({a}).astype(f8) / {b}"),
            lambda prefix, v: f"{prefix}_bin(np.divide, {v[0]}, {v[1]})",
        )

    def op_rem(self, instr: Instr) -> None:
        self._integer_division(instr, "trem")

    def _function(self, instr: Instr, single: str, double: str | None = None) -> None:
        """A function of one operand, as templates of expressions."""
        template = double if double and instr.dtype == "f64" else single
        self._float(
            instr, template.format, lambda prefix, v: f"{prefix}_un(lambda x: {single.format('x')}, {v[0]})"
        )

    def op_rcp(self, instr: Instr) -> None:
        self._function(instr, "rcp({})", "1.0 / {}")

    def op_sqrt(self, instr: Instr) -> None:
        self._function(instr, "np.sqrt({})")

    def op_rsqrt(self, instr: Instr) -> None:
        self._function(instr, "rsqrt4({})", "1.0 / np.sqrt({})")

    def op_ex2(self, instr: Instr) -> None:
        self._function(instr, "np.exp2({})")

    def op_lg2(self, instr: Instr) -> None:
        self._function(instr, "np.log2({})")

    def op_sin(self, instr: Instr) -> None:
        self._function(instr, "sin4({})")

    def op_cos(self, instr: Instr) -> None:
        self._function(instr, "cos4({})")

    def op_tanh(self, instr: Instr) -> None:
        self._function(instr, "np.tanh({})")

    def _sign(self, instr: Instr, bit_operator: str, integer: str) -> None:
        source = instr.ops[1]
        if not instr.is_float:
            code = np_code(instr.dtype)
            self.result(instr, integer.format(self.get(source, code), code), code, source)
            return
        code = "u" + np_code(instr.dtype)[1]
        bit = {"f32": 1 << 31, "f64": 1 << 63, "f16": 1 << 15, "bf16": 1 << 15}.get(instr.dtype, 0x80008000)
        result = f"{self.get(source, code)} {bit_operator}{self.constants.scalar(bit, code)}"
        if instr.has("ftz"):
            self.result(instr, f"ftz(({result}).view(f4))", "f4", source)
        else:
            self.result(instr, result, code, source)

    def op_abs(self, instr: Instr) -> None:
        self._sign(instr, "& ~", "np.abs({}).astype({})")

    def op_neg(self, instr: Instr) -> None:
        self._sign(instr, "^ ", "(-{}).astype({})")

    def op_copysign(self, instr: Instr) -> None:
        code = np_code(instr.dtype)
        sign, value = (self.get(source, code) for source in instr.ops[1:3])
        self.result(instr, f"np.copysign({value}, {sign})", code, *instr.ops[1:])

    def _min_max(self, instr: Instr, ignoring_nan: str, function: str) -> None:
        sources = instr.ops[1:]
        if not instr.is_float:
            code = np_code(instr.dtype)
            a, b = (self.get(source, code) for source in sources)
            self.result(instr, f"np.{function}({a}, {b})", code, *sources)
            return
        if instr.has("xorsign"):
            raise NotImplementedError("xorsign")
        name = function if instr.has("NaN") else ignoring_nan

        def expression(*values: str) -> str:
            result = values[0]
            for value in values[1:]:
                result = f"np.{name}({result}, {value})"
            return result

        self._float(instr, expression, lambda prefix, v: f"{prefix}_bin(np.{name}, {v[0]}, {v[1]})")

    def op_max(self, instr: Instr) -> None:
        self._min_max(instr, "fmax", "maximum")

    def op_min(self, instr: Instr) -> None:
        self._min_max(instr, "fmin", "minimum")

    def op_dp4a(self, instr: Instr) -> None:
        a, b, c = (self.array(source, "u4") for source in instr.ops[1:])
        signed = f"{instr.parts[1] == 's32'}, {instr.parts[2] == 's32'}"
        self.result(instr, f"dp4a({a}, {b}, {c}, {signed})", "u4", ARRAY)

    def op_sad(self, instr: Instr) -> None:
        code = np_code(instr.dtype)
        a, b, c = (self.get(source, code) for source in instr.ops[1:])
        self.result(instr, f"{c} + (np.maximum({a}, {b}) - np.minimum({a}, {b}))", code, *instr.ops[1:])
