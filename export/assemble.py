"""From the journal and the source to the tensors of a quantised checkpoint.

Every tensor of the source keeps its place; a quantised module's weight is replaced by its packed tensors, and
what folding scales has changed by its new values. All floating-point tensors are float16, as the scales are:
readers that take a checkpoint's dtype for everything would round the scales to a shorter one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .containers import HEAD, SCALES, Container, packed_specs
from .errors import ExportError
from .formats.scheme import Scheme
from .journal import Journal
from .merged_weights import MergedWeights
from .tensors import TensorSpec, all_finite
from .writer import CheckpointWriter

LARGEST_HALF = torch.finfo(torch.float16).max
CHECKED = 2**22  # elements looked at at once


@dataclass(frozen=True, slots=True)
class StoredDtype:
    """Of the floating-point tensors of a quantised checkpoint.

    Attributes:
        dtype: float16, or bfloat16 where values would overflow.
        reason: why it is not float16.
    """

    dtype: torch.dtype
    reason: str | None = None

    @property
    def name(self) -> str:
        """As config.json has it."""
        return str(self.dtype).removeprefix("torch.")


def stored_dtype(source: MergedWeights, schemes: Mapping[str, Scheme | None]) -> StoredDtype:
    """float16, unless a tensor that stays as it is holds values beyond it."""
    for name in kept_names(source, schemes):
        largest = max(
            (_largest(block) for block in source.blocks(name, source.checkpoint.mapped(name))), default=0
        )
        if largest > LARGEST_HALF:
            return StoredDtype(
                torch.bfloat16,
                f"{name} holds values up to {largest:.3g}, beyond float16: stored in bfloat16, to which "
                "readers will round the scales too",
            )
    return StoredDtype(torch.float16)


def kept_names(source: MergedWeights, schemes: Mapping[str, Scheme | None]) -> list[str]:
    """The source's tensors that are no quantised module's weight."""
    gone = {f"{module}.weight" for module, scheme in schemes.items() if scheme is not None}
    return [name for name in source.checkpoint.specs if name not in gone]


def planned_specs(
    source: MergedWeights,
    schemes: Mapping[str, Scheme | None],
    container: Container,
    dtype: torch.dtype = torch.float16,
) -> list[TensorSpec]:
    """Every tensor that will be written: sizes to the byte, before anything is quantised."""
    found = []
    for name, spec in source.checkpoint.specs.items():
        module = name.removesuffix(".weight")
        scheme = schemes.get(module) if name.endswith(".weight") else None
        if scheme is None:
            found.append(_stored(spec, dtype))
            continue
        rows, columns = spec.shape
        found += packed_specs(container, module, (rows, columns), scheme)
    return found


def write_quantized(
    writer: CheckpointWriter, journal: Journal, source: MergedWeights, dtype: torch.dtype
) -> None:
    """Write every tensor; one is in memory at a time.

    Raises:
        ExportError: a tensor that was changed is beyond the dtype, NaN by name, a full disk.
    """
    entries = {
        name: entry
        for entry in journal.names()
        if entry.startswith("layer-") or entry == HEAD
        for name in journal.specs(entry)
    }
    stored = MergedWeights(source.checkpoint, source.adapter, base=source.base, nf4=source.nf4, dtype=dtype)
    specs = [_planned(name, entries, journal, source, dtype) for name in _in_order(source, entries)]

    def blocks(spec: TensorSpec) -> Iterable[Tensor]:
        entry = entries.get(spec.name)
        if entry is None:
            yield from stored.blocks(spec.name, source.checkpoint.mapped(spec.name))
            return
        values = journal.tensor(entry, spec.name)
        cast = values.to(spec.dtype)
        if cast.dtype != values.dtype and not all_finite(cast):
            raise ExportError(
                f"{spec.name}: folding scales into it overflows {spec.dtype}; use --scaling none"
            )
        yield cast

    writer.write(specs, blocks)


def quantized_config(
    source: MergedWeights, dtype: StoredDtype, quantization: Mapping[str, Any]
) -> dict[str, Any]:
    """config.json: the base's, with the dtype that was written and how the weights are packed."""
    config = dict(source.config)
    config.pop("torch_dtype", None)  # the name that `dtype` had before transformers 5
    return config | {"dtype": dtype.name, "quantization_config": dict(quantization)}


def _in_order(source: MergedWeights, entries: Mapping[str, str]) -> Iterator[str]:
    """The source's order, packed tensors where the weight was; then what the source has not."""
    packed: dict[str, list[str]] = {}
    for name in entries:
        packed.setdefault(name.rpartition(".")[0], []).append(name)
    given = set()
    for name in source.checkpoint.specs:
        module = name.removesuffix(".weight")
        replaced = name.endswith(".weight") and name not in entries and _is_packed(module, packed)
        names = [its for its in packed[module] if its not in source.checkpoint.specs] if replaced else [name]
        given.update(names)
        yield from names
    yield from (name for name in entries if name not in given)


def _is_packed(module: str, packed: Mapping[str, list[str]]) -> bool:
    return any(name.endswith((".qweight", ".weight_packed")) for name in packed.get(module, ()))


def _planned(
    name: str, entries: Mapping[str, str], journal: Journal, source: MergedWeights, dtype: torch.dtype
) -> TensorSpec:
    if name not in entries:
        return _stored(source.checkpoint.specs[name], dtype)
    spec = journal.specs(entries[name])[name]
    return spec if name.rpartition(".")[2] in SCALES.values() else _stored(spec, dtype)


def _stored(spec: TensorSpec, dtype: torch.dtype) -> TensorSpec:
    return TensorSpec(spec.name, dtype, spec.shape) if spec.dtype.is_floating_point else spec


def _largest(block: Tensor) -> float:
    if not block.is_floating_point() or not block.numel():
        return 0.0
    flat = block.reshape(-1)
    return max(float(flat[first : first + CHECKED].abs().max()) for first in range(0, flat.numel(), CHECKED))
