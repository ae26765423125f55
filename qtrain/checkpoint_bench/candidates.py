"""Which checkpoints are compared: those of the run, and the folders that were named besides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from qtrain.errors import UserError
from qtrain.export.checkpoint import Checkpoint
from qtrain.export.errors import ExportError
from qtrain.export.lora import Adapter
from qtrain.export.merged_weights import MergedWeights
from qtrain.export.nf4_base import NF4Settings
from qtrain.export.quantized_checkpoint import QuantizedCheckpoint
from qtrain.export.streamed_model import StreamedModel
from qtrain.export.verify import remembering
from qtrain.export_command.merge import merged_weights
from qtrain.export_command.source import Source

Kind = Literal["plain", "quantized", "nf4"]

KINDS = ("merged", "gptq", "awq")  # what a run's exports are called
NAMES = {"gptq": "GPTQ", "awq": "AWQ", "compressed-tensors": "compressed-tensors"}
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A form of the model.

    Attributes:
        name: in the tables.
        kind: `plain` weights, `quantized` ones, or the base in `nf4` with the adapter beside it.
        folder: its files; None where it is not there.
        missing: why not, with the command that makes it.
        size: bytes of the weight files that serving it needs.
        bits: of a weight, on average over the packed modules; None where nothing is packed.
        reference: whether the others are held against it.
        adapter: beside an `nf4` base.
        nf4: how an `nf4` base is held.
    """

    name: str
    kind: Kind
    folder: Path | None = None
    missing: str | None = None
    size: int | None = None
    bits: float | None = None
    reference: bool = False
    adapter: Path | None = None
    nf4: NF4Settings | None = None

    def model(self) -> StreamedModel:
        """Its weights, read by this project from their files, computing in float32.

        Raises:
            ExportError: they are damaged.
        """
        assert self.folder is not None
        if self.kind == "quantized":
            quantized = QuantizedCheckpoint.open(self.folder)
            quantized.check_complete()
            return StreamedModel(self.folder, remembering(quantized.weight, "lm_head.weight"))
        checkpoint = Checkpoint.open(self.folder)
        if self.kind == "plain":
            return StreamedModel(self.folder, checkpoint.mapped)
        nf4 = self.nf4 or NF4Settings()
        base = MergedWeights(checkpoint, None, base="dequantized", nf4=nf4, dtype=nf4.compute_dtype)
        extra = None if self.adapter is None else Adapter.open(self.adapter).output
        return StreamedModel(self.folder, base.fetch, extra=extra)


def find_candidates(source: Source, folders: Sequence[Path]) -> list[Candidate]:
    """The reference first, then NF4, then the run's exports, then `folders`.

    Raises:
        UserError: a folder that is no model, or one of another model.
        ExportError: a damaged one.
    """
    found = [_reference(source), _nf4(source)]
    listed = {candidate.folder.resolve() for candidate in found[:1] if candidate.folder is not None}
    places = [source.out(kind) for kind in KINDS[1:]] if source.run is not None else []
    for place in [*places, *folders]:
        if place.is_dir() and place.resolve() in listed:
            continue
        listed.add(place.resolve())
        if place in places:
            found.append(_own_export(place, source))
        elif (place / "config.json").is_file():
            found.append(_on_disk(place))
        else:
            what = "holds no config.json" if place.is_dir() else "is no folder"
            raise UserError(f"{place} {what}; give the folder of an exported model")
    _check_vocabulary(source, found)
    there = [candidate.name for candidate in found if candidate.missing is None]
    return _apart([its for its in found if its.missing is None or not _stands_for(its, there)])


def reference_model(source: Source, candidate: Candidate) -> StreamedModel:
    """The 16-bit weights: read from their files, or merged on the way where they have not been written."""
    if candidate.folder is not None:
        return candidate.model()
    return StreamedModel(source.base, merged_weights(source, "auto", "stored").fetch)


def _reference(source: Source) -> Candidate:
    dtype = _dtype(Checkpoint.open(source.base))
    if source.run is None and source.adapter is None:
        return replace(_on_disk(source.base), name=dtype, reference=True)
    folder = source.out("merged")
    if (folder / "config.json").is_file():
        return replace(_on_disk(folder), name=f"{dtype} merged", reference=True)
    missing = f"not exported: qtrain export merge {source.name}"
    return Candidate(f"{dtype} merged", "plain", missing=missing, reference=True)


def _nf4(source: Source) -> Candidate:
    """Served as it was trained: the base is quantised while it is loaded, the adapter stays beside it."""
    checkpoint = Checkpoint.open(source.base)
    size = checkpoint.nbytes
    if source.adapter is not None:
        size += sum(path.stat().st_size for path in source.adapter.glob("*.safetensors"))
    nf4 = source.nf4() or NF4Settings(compute_dtype=source.compute_dtype())
    name = "NF4" if source.adapter is None else "NF4 + adapter"
    return Candidate(name, "nf4", source.base, None, size, adapter=source.adapter, nf4=nf4)


def _stands_for(absent: Candidate, names: Sequence[str]) -> bool:
    """Whether an export of the run that is not there is one of the folders that were given."""
    return absent.kind == "quantized" and any(name.startswith(absent.name) for name in names)


def _own_export(place: Path, source: Source) -> Candidate:
    """A damaged one is a row like one that is not there: the others can be compared all the same."""
    name, command = NAMES[place.name], f"qtrain export {place.name} {source.name}"
    if not (place / "config.json").is_file():
        return Candidate(name, "quantized", missing=f"not exported: {command}")
    try:
        return _on_disk(place)
    except ExportError as error:
        return Candidate(name, "quantized", missing=f"failed: {error}")


def _on_disk(folder: Path) -> Candidate:
    checkpoint = Checkpoint.open(folder, quantized=True)
    if "quantization_config" not in checkpoint.config and not (folder / "quantize_config.json").is_file():
        return Candidate(f"{_dtype(checkpoint)} ({folder.name})", "plain", folder, None, checkpoint.nbytes)
    quantized = QuantizedCheckpoint.open(folder)
    scheme, _ = Counter(quantized.schemes.values()).most_common(1)[0]
    size = "whole rows" if scheme.group_size == -1 else f"group {scheme.group_size}"
    mixed = " (mixed)" if len(set(quantized.schemes.values())) > 1 else ""
    name = f"{NAMES[quantized.container]} {scheme.bits}-bit, {size}{mixed}"
    return Candidate(name, "quantized", folder, None, checkpoint.nbytes, _bits(quantized))


def _bits(quantized: QuantizedCheckpoint) -> float:
    """Of a packed weight, with its share of scales, zero points and indices."""
    stored = weights = 0.0
    for name, spec in quantized.checkpoint.specs.items():
        module, _, last = name.rpartition(".")
        if module not in quantized.schemes or last == "bias":
            continue
        stored += 8 * spec.nbytes
        if last in ("qweight", "weight_packed"):
            weights += 8 * spec.nbytes / quantized.schemes[module].bits
    return stored / weights


def _dtype(checkpoint: Checkpoint) -> str:
    counts = Counter(spec.dtype for spec in checkpoint.specs.values())
    dtype = counts.most_common(1)[0][0]
    return DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def _check_vocabulary(source: Source, found: Sequence[Candidate]) -> None:
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers")
    wanted = Checkpoint.open(source.base).config
    for candidate in found:
        if candidate.folder is None:
            continue
        config = Checkpoint.open(candidate.folder, quantized=True).config
        for name in sizes:
            if config.get(name) != wanted.get(name):
                raise UserError(
                    f"{candidate.folder} is another model than {source.name}: {name} is {config.get(name)}, "
                    f"not {wanted.get(name)}"
                )


def _apart(found: Sequence[Candidate]) -> list[Candidate]:
    """Of candidates with the same name, all but the first get their folder's name behind it."""
    seen: Counter[str] = Counter()
    named = []
    for candidate in found:
        seen[candidate.name] += 1
        if seen[candidate.name] > 1 and candidate.folder is not None:
            name = f"{candidate.name} ({candidate.folder.name})"
            seen[name] += 1
            candidate = replace(candidate, name=name if seen[name] == 1 else f"{name} {seen[name]}")
        named.append(candidate)
    return named
