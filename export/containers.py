"""The formats that quantised weights are written in, behind one interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .errors import ExportError
from .formats import awq, compressed_tensors, gptq
from .formats.quantized import QuantizedLinear
from .formats.scheme import Scheme
from .tensors import TensorSpec

Container = Literal["gptq", "awq", "compressed-tensors"]
NAMES: tuple[Container, ...] = get_args(Container)
MARKS = {"gptq": "qweight", "awq": "qweight", "compressed-tensors": "weight_packed"}  # every module has one
SCALES = {"gptq": "scales", "awq": "scales", "compressed-tensors": "weight_scale"}
# what `unpack` reads; those in the second part are there in some checkpoints only
PARTS: dict[str, tuple[str, ...]] = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_shape"),
}
HEAD = "lm_head"


def check_scheme(container: Container, scheme: Scheme) -> None:
    """Refuse what a format has no place for.

    Raises:
        ExportError: says which option to change.
    """
    if container == "awq":
        awq.check_scheme(scheme)
    elif container == "compressed-tensors":
        compressed_tensors.check_scheme(scheme)


def pack(container: Container, linear: QuantizedLinear, module: str) -> dict[str, Tensor]:
    """A module's tensors by their names behind `module.`; errors as the formats' own `pack`."""
    packers = {"gptq": gptq.pack, "awq": awq.pack, "compressed-tensors": compressed_tensors.pack}
    return packers[container](linear, module)


def packed_specs(
    container: Container, module: str, shape: tuple[int, int], scheme: Scheme
) -> list[TensorSpec]:
    """What `pack` would give for a weight of a shape [N, K].

    Raises:
        ExportError: the format can't hold it.
    """
    found = _packed_specs(container, shape, scheme)
    return [TensorSpec(f"{module}.{its.name}", its.dtype, its.shape) for its in found]


@lru_cache(maxsize=64)
def _packed_specs(container: Container, shape: tuple[int, int], scheme: Scheme) -> list[TensorSpec]:
    """Zeros, packed for real."""
    rows, columns = shape
    groups = scheme.groups(columns)
    middle = torch.full((rows, groups), scheme.middle, dtype=torch.uint8)
    linear = QuantizedLinear(
        torch.zeros(shape, dtype=torch.uint8),
        torch.ones(rows, groups, dtype=torch.float16),
        None if scheme.symmetric else middle,
        torch.zeros(columns, dtype=torch.int32) if scheme.desc_act else None,
        scheme.bits,
        scheme.group_size,
    )
    return [TensorSpec.of(suffix, tensor) for suffix, tensor in pack(container, linear, "a module").items()]


def quantization_config(
    container: Container,
    scheme: Scheme,
    schemes: Mapping[str, Scheme | None],
    *,
    damp: float,
    meta: Mapping[str, Any],
) -> dict[str, Any]:
    """config.json's `quantization_config`.

    Args:
        scheme: of most modules.
        schemes: of every linear module by full name; None is left in 16 bits. A head that is not named is
            left in 16 bits as well.
        damp: of the Gram matrix, for those who ask how it was made.
        meta: who made it.

    Raises:
        ExportError: schemes that the format has no place for.
    """
    skipped = [module for module, its in schemes.items() if its is None and module != HEAD]
    others = {module: its for module, its in schemes.items() if its is not None and its != scheme}
    head = schemes.get(HEAD) is not None
    if container == "gptq":
        return gptq.config(
            scheme, overrides=others, skipped=skipped, lm_head=head, damp_percent=damp, meta=meta
        )
    if container == "awq":
        check_one_scheme(schemes, scheme)
        return awq.config(scheme, skipped=skipped, meta=meta)
    return compressed_tensors.config(scheme, overrides=others, skipped=skipped + ([] if head else [HEAD]))


def check_one_scheme(schemes: Mapping[str, Scheme | None], scheme: Scheme) -> None:
    """AWQ GEMM has one scheme for all modules, and no quantised head.

    Raises:
        ExportError: names a module.
    """
    other = next((module for module, its in schemes.items() if its is not None and its != scheme), None)
    if other is not None:
        raise ExportError(
            f"{other}: AWQ GEMM has one scheme for all modules; --set can leave some in 16 bits (bits=16), "
            "anything else needs --format compressed-tensors"
        )
    if schemes.get(HEAD) is not None:
        raise ExportError(
            "--lm-head: readers of AWQ GEMM keep the head in 16 bits; leave it out, or use qtrain export gptq"
        )


def uniform(schemes: Sequence[Scheme | None]) -> Scheme:
    """The scheme that most modules have."""
    known = [scheme for scheme in schemes if scheme is not None]
    return max(dict.fromkeys(known), key=known.count)
