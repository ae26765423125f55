"""safetensors files: what is in one, and writing one without holding it in memory.

The library writes a file from tensors that are all there at once. `write_tensors` writes the same bytes
(tested) from one block of rows after another.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .disk import flush
from .errors import ExportError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# the library's order: by its own ranking of dtypes, the widest first, then by name
_RANK = ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "I16", "F16", "BF16", "I32", "F32", "F64", "I64")
CHECKED = 2**22  # elements looked at for NaN at once


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor apart from its values."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in a file."""
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> TensorSpec:
        """The spec of a tensor that is there."""
        return cls(name, tensor.dtype, tuple(tensor.shape))


@dataclass(frozen=True, slots=True)
class Written:
    """A file that was written."""

    path: Path
    nbytes: int
    sha256: str


Blocks = Callable[[TensorSpec], Iterable[Tensor]]


def read_specs(path: Path) -> dict[str, TensorSpec]:
    """What a safetensors file holds, by name; the layout is checked against the file's length.

    Raises:
        ExportError: no file, a file that is cut or no safetensors file, a dtype that is not known here.
    """
    found = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (it is no mapping)
                part = file.get_slice(name)
                if part.get_dtype() not in DTYPES:
                    raise ExportError(f"{path}: {name} is {part.get_dtype()}, which is not supported")
                found[name] = TensorSpec(name, DTYPES[part.get_dtype()], tuple(part.get_shape()))
    except FileNotFoundError as error:
        raise ExportError(f"{path} is missing; get the model again") from error
    except (SafetensorError, OSError) as error:
        raise ExportError(
            f"{path} is damaged or no safetensors file ({error}); get the model again"
        ) from error
    return found


def check_finite(name: str, tensor: Tensor, where: object) -> None:
    """Refuse weights that are no numbers.

    Raises:
        ExportError: names the tensor, and counts its NaN and infinities.
    """
    if not tensor.is_floating_point():
        return
    flat = tensor.reshape(-1)
    parts = range(0, flat.numel(), CHECKED)
    if all(all_finite(flat[first : first + CHECKED]) for first in parts):
        return
    nan = sum(int(torch.isnan(flat[first : first + CHECKED]).sum()) for first in parts)
    infinite = sum(int(torch.isinf(flat[first : first + CHECKED]).sum()) for first in parts)
    raise ExportError(
        f"{where}: {name} holds {nan} NaN and {infinite} infinite values of {flat.numel()}; "
        "get the model again, or train from a checkpoint before they came up"
    )


def all_finite(tensor: Tensor) -> bool:
    """Whether there is no NaN and no infinity; a sum, which either would spoil, tells in one pass."""
    if bool(torch.isfinite(tensor.sum(dtype=torch.float32))):
        return True
    return bool(torch.isfinite(tensor).all())


def shape_text(shape: Sequence[int]) -> str:
    """A tensor's shape, for messages."""
    return " x ".join(map(str, shape)) or "a single number"


def in_file_order(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """As the safetensors library lays tensors out in a file."""
    return sorted(specs, key=lambda spec: (-_RANK.index(_NAMES[spec.dtype]), spec.name))


def write_tensors(path: Path, specs: Sequence[TensorSpec], blocks: Blocks) -> Written:
    """Write a safetensors file of `specs` in their order; it is on disk when this returns.

    `blocks(spec)` gives the values: tensors of the spec's dtype whose elements, in order, are the tensor's.
    One block is in memory at a time.

    Raises:
        ValueError: the blocks are not those of the spec.
        OSError: the disk is full, say.
    """
    digest = hashlib.sha256()
    written = 0
    with path.open("wb") as file:

        def put(content: Any) -> None:
            nonlocal written
            file.write(content)
            digest.update(content)
            written += len(content)

        put(_header(specs))
        for spec in specs:
            begun = written
            for block in blocks(spec):
                if block.dtype != spec.dtype:
                    raise ValueError(f"{spec.name}: a block is {block.dtype}, must be {spec.dtype}")
                put(_memory(block))
            if written - begun != spec.nbytes:
                raise ValueError(f"{spec.name}: {written - begun} bytes were given, must be {spec.nbytes}")
        file.flush()
        flush(file.fileno())
    return Written(path, written, digest.hexdigest())


def write_whole(path: Path, tensors: Mapping[str, Tensor]) -> Written:
    """`write_tensors` for tensors that are there."""
    specs = in_file_order(TensorSpec.of(name, tensor) for name, tensor in tensors.items())
    return write_tensors(path, specs, lambda spec: (tensors[spec.name],))


def _header(specs: Sequence[TensorSpec]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        if spec.name in entries:
            raise ValueError(f"{spec.name} is there twice")
        entries[spec.name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight
    return len(text).to_bytes(8, "little") + text


def _memory(block: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it is contiguous in the machine's memory."""
    plain = block.detach().cpu().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().data
