"""A quantised folder as the quantizers' benchmark looks at it: its weights by name, its scheme, its size.

Reading and unpacking are the export room's. Added is what other writers do otherwise (a folder inside the
folder), and what is counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qtrain.export.checkpoint import EMBEDDING
from qtrain.export.errors import ExportError
from qtrain.export.formats.scheme import Scheme
from qtrain.export.quantized_checkpoint import QuantizedCheckpoint


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a folder takes.

    Attributes:
        bits_per_weight: of the quantised modules, scales, zero points and indices included.
        quantized_share: of the decoder layers' matrices, by elements.
        file_bytes: of all weight files.
    """

    bits_per_weight: float
    quantized_share: float
    file_bytes: int


class QuantizedFolder:
    """A folder with GPTQ, AWQ GEMM or compressed-tensors weights.

    Attributes:
        weights: its reader.
        scheme: of all of its modules.

    Raises:
        ExportError: not such a folder, or more than one scheme.
    """

    def __init__(self, folder: Path) -> None:
        self.weights = QuantizedCheckpoint.open(_innermost(folder))
        schemes = set(self.weights.schemes.values())
        if len(schemes) > 1:
            raise ExportError(f"{folder}: {len(schemes)} schemes in one model can't be compared")
        self.scheme: Scheme = schemes.pop()
        self._embedding: Tensor | None = None

    @property
    def hashes(self) -> list[str]:
        """SHA-256 of its weight files."""
        checkpoint = self.weights.checkpoint
        return [checkpoint.sha256(file) for file in checkpoint.files]

    def fetch(self, name: str) -> Tensor:
        """A parameter of the 16-bit model by its name, as this folder has it."""
        if name != EMBEDDING:
            return self.weights.weight(name)
        if self._embedding is None:  # the head asks for it again with every few positions
            self._embedding = self.weights.weight(name).to(torch.float32)
        return self._embedding

    def sizes(self) -> Sizes:
        """Its bytes, in the files and for each weight."""
        specs = self.weights.checkpoint.specs
        stored = weights = others = 0
        for name, spec in specs.items():
            module, _, last = name.rpartition(".")
            if module in self.weights.schemes:
                stored += spec.nbytes if last != "bias" else 0
            elif ".layers." in name and last == "weight" and len(spec.shape) == 2:
                others += spec.nbytes // spec.dtype.itemsize
        for module in self.weights.schemes:
            n, k = self.weights.dequantized(module).shape
            weights += n * k
        return Sizes(8 * stored / weights, weights / (weights + others), self.weights.checkpoint.nbytes)


def _innermost(folder: Path) -> Path:
    """The folder, or the one in it where a writer made another of its own naming."""
    if (folder / "config.json").is_file():
        return folder
    inner = sorted(path.parent for path in folder.glob("*/config.json"))
    if len(inner) != 1:
        raise ExportError(f"{folder} has no config.json")
    return inner[0]
