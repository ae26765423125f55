"""How a linear layer is quantised, apart from its values; and which sizes a format can hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import ExportError

WORD = 32  # bits: the formats pack values into int32
GROUP_SIZES = (128, 64, 32)  # that kernels of the readers serve, besides -1
FUSED = {  # what vLLM reads as one layer, under which name
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


@dataclass(frozen=True, slots=True)
class Scheme:
    """W[n, k] = scales[n, g] (q[n, k] - z[n, g]) with g the group of column k.

    Attributes:
        bits: of q: 4 or 8 (2 as well for GPTQ).
        group_size: columns that share a scale; -1 for the whole row.
        symmetric: z is 2^(bits-1) everywhere.
        desc_act: columns were grouped in the order of their activation, so that g_idx is not trivial.

    Raises:
        ExportError: bits or group_size outside of that.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    desc_act: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8):
            raise ExportError(f"bits is {self.bits}, must be 2, 4 or 8")
        if self.group_size != -1 and self.group_size < 1:
            raise ExportError(f"group_size is {self.group_size}, must be positive, or -1 for the whole row")

    @property
    def middle(self) -> int:
        """z of symmetric quantisation."""
        return 1 << (self.bits - 1)

    @property
    def top(self) -> int:
        """The largest q."""
        return (1 << self.bits) - 1

    def group_length(self, in_features: int) -> int:
        """Columns of a group."""
        return in_features if self.group_size == -1 else self.group_size

    def groups(self, in_features: int) -> int:
        """Groups of a row."""
        return in_features // self.group_length(in_features)


def check_shape(module: str, out_features: int, in_features: int, scheme: Scheme) -> None:
    """Refuse a layer that the packed formats can't hold.

    Raises:
        ExportError: names the module, its in_features and the group sizes that divide them.
    """
    check_shapes({module: (out_features, in_features)}, scheme)


def check_shapes(shapes: Mapping[str, tuple[int, int]], scheme: Scheme) -> None:
    """`check_shape` for every (out_features, in_features); group sizes proposed divide them all.

    Raises:
        ExportError: names the first module that does not fit, and how many do not.
    """
    uneven = [module for module, (_, columns) in shapes.items() if columns % scheme.group_length(columns)]
    if uneven:
        fitting = fitting_group_sizes(columns for _, columns in shapes.values())
        others = f" (nor those of {len(uneven) - 1} others)" if len(uneven) > 1 else ""
        raise ExportError(
            f"{uneven[0]}: group_size {scheme.group_size} does not divide its in_features "
            f"{shapes[uneven[0]][1]}{others}; "
            f"sizes that do: {', '.join(map(str, fitting))} (-1: the whole row)"
        )
    per_word = WORD // scheme.bits
    for module, (rows, columns) in shapes.items():
        for name, size in (("in_features", columns), ("out_features", rows)):
            if size % per_word:
                raise ExportError(
                    f"{module}: {name} {size} is no multiple of {per_word}, which {scheme.bits}-bit packing "
                    "needs; leave the module in 16 bits (--set modules.NAME.bits=16)"
                )


def fitting_group_sizes(in_features: Iterable[int]) -> list[int]:
    """Of 128, 64, 32: those which divide every one, and -1, which always does."""
    sizes = set(in_features)
    return [group for group in GROUP_SIZES if all(size % group == 0 for size in sizes)] + [-1]
