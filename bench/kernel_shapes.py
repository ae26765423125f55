"""What is timed: the linears and heads of named models, by row count, with their operations and bytes.

Nothing here imports torch: the command checks its arguments against these names first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Base = Literal["nf4", "16-bit"]

OPS = ("lora_linear", "lora_linear_group", "nf4_dequantize", "linear_logprob")
ROWS = (128, 137, 256, 512, 1000, 1024, 2048, 4096, 8192, 16384)  # 137 and 1000 fit no tile
QUICK_MODELS = ("0.5B",)
QUICK_ROWS = (128, 512)
QUICK_PARTS = ("q, o", "down", "q/k/v", "head")

RANK = 64
DROPOUT_P = 0.05
NF4_BYTES = 0.5 + (1 + 4 / 256) / 64  # a weight: half a byte, 8 bits for 64, 32 for 256 of those
FACTOR_BYTES = 4  # adapters are float32


@dataclass(frozen=True, slots=True)
class Model:
    """The sizes that decide its linears."""

    name: str
    hidden: int
    kv: int
    intermediate: int
    vocabulary: int

    def parts(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """Name -> (N of each layer, K); layers of one size go by one name, groups share their input."""
        wide, narrow, inner = self.hidden, self.kv, self.intermediate
        return {
            "q, o": ((wide,), wide),
            "k, v": ((narrow,), wide),
            "gate, up": ((inner,), wide),
            "down": ((wide,), inner),
            "q/k/v": ((wide, narrow, narrow), wide),
            "gate/up": ((inner, inner), wide),
            "head": ((self.vocabulary,), wide),
        }


MODELS = {
    "0.5B": Model("Qwen2.5-0.5B", 896, 128, 4864, 151936),
    "1.5B": Model("Qwen2.5-1.5B", 1536, 256, 8960, 151936),
    "7B": Model("Qwen2.5-7B", 3584, 512, 18944, 152064),
}

_PARTS_OF = {
    "lora_linear": ("q, o", "k, v", "gate, up", "down"),
    "lora_linear_group": ("q/k/v", "gate/up"),
    "nf4_dequantize": ("q, o", "k, v", "gate, up", "down"),
    "linear_logprob": ("head",),
}
_BASES_OF: dict[str, tuple[Base, ...]] = {
    "lora_linear": ("nf4", "16-bit"),
    "lora_linear_group": ("nf4", "16-bit"),
    "nf4_dequantize": ("nf4",),
    "linear_logprob": ("16-bit",),
}
PASSES_OF = {
    # what a backward has to do depends on what the forward saved: so their sum is timed as well
    "lora_linear": ("forward", "backward", "forward+backward"),
    "lora_linear_group": ("forward", "backward", "forward+backward"),
    "nf4_dequantize": ("forward",),
    "linear_logprob": ("forward", "forward+backward"),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One op at one shape; its passes are timed apart."""

    op: str
    model: str
    part: str
    base: Base
    dtype: str
    rows: int  # M; 0 where the op has none
    columns: tuple[int, ...]  # N of each layer
    inner: int  # K
    rank: int = RANK
    dropout_p: float = DROPOUT_P

    @property
    def passes(self) -> tuple[str, ...]:
        """What is timed."""
        return PASSES_OF[self.op]

    @property
    def lora(self) -> bool:
        """Whether it is one of the two LoRA ops."""
        return self.op.startswith("lora")

    def flops(self, which: str) -> float:
        """Floating-point operations of the definition, nothing computed twice."""
        if self.lora and which == "forward+backward":
            return self.flops("forward") + self.flops("backward")
        m, n, k = self.rows, sum(self.columns), self.inner
        r, rs = len(self.columns) * self.rank, self.rank
        if self.op == "nf4_dequantize":
            return float(n * k)
        if self.op == "linear_logprob":
            return 2.0 * m * n * k * (2 if which == "forward+backward" else 1)
        thin = m * (rs * n + r * k)  # one product with all A's and one with all B's
        return 2.0 * (m * n * k + thin * (2 if which == "backward" else 1))

    def ideal_bytes(self, which: str) -> float:
        """Bytes if every input were read once and every output written once, and nothing else."""
        if self.lora and which == "forward+backward":
            return self.ideal_bytes("forward") + self.ideal_bytes("backward")
        m, n, k, e = self.rows, sum(self.columns), self.inner, _BYTES[self.dtype]
        weight = n * k * (NF4_BYTES if self.base == "nf4" else e)
        if self.op == "nf4_dequantize":
            return weight + n * k * e
        if self.op == "linear_logprob":
            return weight + m * (k * e + 12) + (m * (k * e + 4) if which == "forward+backward" else 0)
        r = len(self.columns) * self.rank
        factors = (self.rank * n + r * k) * FACTOR_BYTES
        forward = weight + factors + m * (k + n) * e  # x in, y out
        if which == "forward":
            return forward
        return forward + factors + m * (k + r) * e  # dy in, x and xa in, dx out, the factors' gradients out


_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
DTYPES = tuple(_BYTES)


def cases(
    ops: Sequence[str], models: Sequence[str], rows: Sequence[int], dtype: str, *, quick: bool
) -> Iterator[Case]:
    """Every case of the ops over the models, in order.

    Raises:
        KeyError: an op, model or dtype that is not listed above.
    """
    for op in ops:
        for name in models:
            for part in _PARTS_OF[op]:
                if quick and part not in QUICK_PARTS:
                    continue
                columns, inner = MODELS[name].parts()[part]
                for base in _BASES_OF[op]:
                    for m in [0] if op == "nf4_dequantize" else rows:
                        yield Case(op, MODELS[name].name, part, base, dtype, m, columns, inner)
