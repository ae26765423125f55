"""Activations of the calibration windows, some windows to a chunk, in memory or in a file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .disk import disk_errors


class Chunks:
    """A list of tensors of one dtype that lies in memory, or one behind the other in a file.

    Args:
        file: where to spill to; None keeps all in memory.
        device: where `[...]` gives them back.
    """

    def __init__(self, file: Path | None = None, *, device: torch.device | str = "cpu") -> None:
        self._file = file
        self._device = torch.device(device)
        self._kept: list[Tensor | None] = []
        self._places: list[tuple[int, tuple[int, ...], torch.dtype]] = []
        self._end = 0
        if file is not None:
            with disk_errors("spilled hidden states", file):
                file.parent.mkdir(parents=True, exist_ok=True)
                file.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._kept) if self._file is None else len(self._places)

    def append(self, tensor: Tensor) -> None:
        """Add a chunk.

        Raises:
            ExportError: the disk is full.
        """
        tensor = tensor.detach()
        if self._file is None:
            self._kept.append(tensor)
            return
        plain = tensor.cpu().contiguous()
        with disk_errors("spilled hidden states", self._file), self._file.open("ab") as file:
            file.write(plain.view(-1).view(torch.uint8).numpy().data)
        self._places.append((self._end, tuple(plain.shape), plain.dtype))
        self._end += plain.nbytes

    def __getitem__(self, index: int) -> Tensor:
        if self._file is None:
            kept = self._kept[index]
            if kept is None:
                raise IndexError(f"chunk {index} was taken")
            return kept.to(self._device)
        offset, shape, dtype = self._places[index]
        content = bytearray(math.prod(shape) * dtype.itemsize)
        with self._file.open("rb") as file:
            file.seek(offset)
            file.readinto(content)
        return torch.frombuffer(content, dtype=dtype).view(shape).to(self._device)

    def take(self, index: int) -> Tensor:
        """A chunk for the last time; its memory is given back (of a file, by `clear`)."""
        found = self[index]
        if self._file is None:
            self._kept[index] = None
        return found

    def clear(self) -> None:
        """Give memory and file back."""
        self._kept.clear()
        self._places.clear()
        self._end = 0
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def by_name(self) -> Mapping[str, Tensor]:
        """The chunks as named tensors on the CPU, one in memory at a time: for a journal."""
        return _Named(self)


class _Named(Mapping[str, Tensor]):
    def __init__(self, chunks: Chunks) -> None:
        self._chunks = chunks

    def __getitem__(self, name: str) -> Tensor:
        return self._chunks[int(name)].cpu()

    def __iter__(self) -> Iterator[str]:
        return (f"{index:05d}" for index in range(len(self._chunks)))

    def __len__(self) -> int:
        return len(self._chunks)
