"""A model quantised one decoder layer at a time: what is in memory does not grow with its depth.

Each layer is calibrated on what the layers before it give once they are quantised. After a layer its packed
tensors and the hidden states behind it are in the journal, so that a killed export goes on from there and
ends with the same bytes.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtrain.kernels.native_bf16 import multiplies_bf16

from .checkpoint import EMBEDDING
from .chunks import Chunks
from .formats.quantized import QuantizedLinear
from .formats.scheme import Scheme
from .journal import Journal
from .layer import Stream, fill, run_layer
from .merged_weights import MergedWeights
from .quantize_stage import StageSettings, quantize_stage
from .rounding.gram import GramSum
from .rounding.linear import Rounded
from .structure import Stage, Structure, layer_calls, linear

STATES = "states"  # hidden states of the model as far as it is quantised
ORIGINALS = "states-original"  # those of the original model, for the correction

Pack = Callable[[QuantizedLinear, str], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Step:
    """A module that is done.

    Attributes:
        layer, layers: its decoder layer, of how many.
        module: full name.
        error: the relative squared error of its output on the calibration tokens; None where it stays in 16
            bits.
        seconds: since the module before.
        note: what a user should know of.
    """

    layer: int
    layers: int
    module: str
    error: float | None
    seconds: float
    note: str | None = None


Progress = Callable[[Step], None]


@dataclass(frozen=True, slots=True)
class Compute:
    """Where and in which memory a model is quantised.

    Attributes:
        device: of the layer that is worked at.
        dtype: of its weights and activations; sums and rounding are float32 always.
        activation_bytes: of the tokens that go through a layer at once, about.
        states_bytes: of what is kept of all tokens, above which it lies in files beside the export.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    activation_bytes: int = 2**26
    states_bytes: int = 2**29

    def windows_at_once(self, structure: Structure, length: int) -> int:
        """Windows of a chunk."""
        return max(1, self.activation_bytes // (length * bytes_per_token(structure, self.dtype)))

    def spills(self, structure: Structure, tokens: int, models: int = 1) -> bool:
        """Whether what is kept lies in files; `models` is 2 where the original model runs beside."""
        return tokens * kept_per_token(structure, self.dtype, models) > self.states_bytes


def native_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where its products are faster; enough to calibrate by, in half the memory (lab-log.md)."""
    return torch.bfloat16 if multiplies_bf16(device) else torch.float32


def bytes_per_token(structure: Structure, dtype: torch.dtype) -> int:
    """What a layer's forward holds for each token of a chunk beside a stage's inputs, at most, about."""
    widest_in, widest_out = _widest(structure)
    return dtype.itemsize * (4 * structure.model.config.hidden_size + 3 * widest_out + widest_in)


def kept_per_token(structure: Structure, dtype: torch.dtype, models: int) -> int:
    """What is kept of a token between passes, at most: states, a child's outputs, a last linear's inputs."""
    hidden = structure.model.config.hidden_size
    return dtype.itemsize * (2 * models * hidden + _widest(structure)[0])


def _widest(structure: Structure) -> tuple[int, int]:
    """The largest in_features and out_features of a layer's linear modules."""
    layer = structure.layer(0)
    linears = [linear(layer, name) for stage in structure.stages for name in stage.linears]
    return max(its.in_features for its in linears), max(its.out_features for its in linears)


def quantize_layers(
    structure: Structure,
    source: MergedWeights,
    windows: Tensor,
    schemes: Mapping[str, Scheme | None],
    settings: StageSettings,
    pack: Pack,
    journal: Journal,
    compute: Compute,
    progress: Progress = lambda _: None,
) -> None:
    """Quantise every decoder layer into the journal's entries `layer-<i>`.

    An entry's tensors are the packed ones of each quantised module, and those others of the layer that
    folding scales has changed; its notes are the modules' errors.

    Args:
        windows: calibration, [n, T] int64.
        schemes: of each linear module by its full name; None leaves it in 16 bits.
        pack: from a format.
        journal: whose key covers all of these arguments.

    Raises:
        ExportError: names the module that can't be quantised.
    """
    length = windows.shape[1]
    blank = torch.zeros(1, length, structure.model.config.hidden_size, dtype=compute.dtype)
    calls = layer_calls(structure.model, structure.layers, blank)
    kinds = (STATES, ORIGINALS) if settings.correction else (STATES,)
    spills = compute.spills(structure, windows.numel(), len(kinds))
    stores = _Stores(journal.folder / "spilled" if spills else None, compute.device)
    begun, before = _resume(journal, stores, structure.count, kinds)
    if before is None:
        before = {kind: _embed(source, structure, windows, compute, stores) for kind in kinds}
    for index in range(begun, structure.count):
        layer = structure.layer(index)
        fill(layer, f"{structure.layers}.{index}", source, dtype=compute.dtype, device=compute.device)
        work = _Layer(structure, source, index, schemes, settings, pack, progress)
        call = _on(calls[index], compute.device)
        streams = {STATES: Stream(layer, call, before[STATES], stores.new())}
        if ORIGINALS in kinds:
            streams[ORIGINALS] = Stream(copy.deepcopy(layer), call, before[ORIGINALS], stores.new())
        run_layer(streams[STATES], structure.stages, work.stage, stores.new, streams.get(ORIGINALS))
        for states in before.values():
            states.clear()
        before = {kind: stream.out for kind, stream in streams.items()}
        for kind in reversed(kinds):
            if index + 1 < structure.count or (kind == STATES and settings.keep_last_states):
                journal.save(f"{kind}-{index + 1}", before[kind].by_name())
        journal.save(f"layer-{index}", work.tensors(), {"errors": work.errors, "seconds": work.seconds()})
        for kind in kinds:
            journal.drop(f"{kind}-{index}")
    for states in before.values():
        states.clear()


class _Layer:
    """Collects what becomes of one decoder layer."""

    def __init__(
        self,
        structure: Structure,
        source: MergedWeights,
        index: int,
        schemes: Mapping[str, Scheme | None],
        settings: StageSettings,
        pack: Pack,
        progress: Progress,
    ) -> None:
        self._structure = structure
        self._source = source
        self._index = index
        self._schemes = schemes
        self._settings = settings
        self._pack = pack
        self._progress = progress
        self._begun = self._last = time.monotonic()
        self._rounded: dict[str, Rounded] = {}
        self._changed: dict[str, Tensor] = {}
        self.errors: dict[str, float] = {}

    def stage(self, stage: Stage, sums: GramSum) -> None:
        """Quantise a stage, and note what was found."""
        names = {name: self._full(name) for name in stage.linears}
        done = quantize_stage(
            self._structure.layer(self._index),
            stage,
            sums,
            {name: self._schemes[full] for name, full in names.items()},
            names,
            self._settings,
            links=self._structure.links,
            earlier=self._rounded,
            stored=lambda name: self._source.weight(self._full(name)),
        )
        self._rounded |= done.rounded
        self._changed |= done.changed
        for name, full in names.items():
            rounded = done.rounded.get(name)
            if rounded is not None:
                self.errors[full] = rounded.error
            now = time.monotonic()
            self._progress(
                Step(
                    self._index,
                    self._structure.count,
                    full,
                    None if rounded is None else rounded.error,
                    now - self._last,
                    done.notes.get(name),
                )
            )
            self._last = now

    def tensors(self) -> dict[str, Tensor]:
        """By full name: packed only now, as a later stage folds its scales into an earlier module."""
        found = {self._full(name): values.cpu() for name, values in self._changed.items()}
        for name in list(self._rounded):
            packed = self._pack(self._rounded.pop(name).linear, self._full(name))
            found |= {f"{self._full(name)}.{suffix}": values.cpu() for suffix, values in packed.items()}
        return found

    def _full(self, name: str) -> str:
        return self._structure.module(self._index, name)

    def seconds(self) -> float:
        """Since the layer was begun."""
        return round(time.monotonic() - self._begun, 3)


class _Stores:
    """Makes stores for hidden states: in memory, or in files of their own below a folder."""

    def __init__(self, folder: Path | None, device: torch.device) -> None:
        self._folder = folder
        self._device = device
        self._made = 0

    def new(self) -> Chunks:
        self._made += 1
        file = None if self._folder is None else self._folder / f"{self._made}.bin"
        return Chunks(file, device=self._device)


def _resume(
    journal: Journal, stores: _Stores, count: int, kinds: Sequence[str]
) -> tuple[int, dict[str, Chunks] | None]:
    """The first layer that is not done, and the states of each kind before it."""
    done = 0
    while done < count and f"layer-{done}" in journal:
        done += 1
    if done == count:
        return done, {}
    while done and any(f"{kind}-{done}" not in journal for kind in kinds):
        done -= 1  # the states behind the last layer were damaged: from an earlier one, which has none but 0
    if not done:
        return 0, None
    before = {}
    for kind in kinds:
        before[kind] = stores.new()
        for name in sorted(journal.specs(f"{kind}-{done}")):
            before[kind].append(journal.tensor(f"{kind}-{done}", name))
    return done, before


def _embed(
    source: MergedWeights, structure: Structure, windows: Tensor, compute: Compute, stores: _Stores
) -> Chunks:
    changed = source.changes(EMBEDDING)
    table = source.tensor(EMBEDDING) if changed else source.checkpoint.mapped(EMBEDDING)
    states = stores.new()
    for part in windows.split(compute.windows_at_once(structure, windows.shape[1])):
        states.append(table[part].to(compute.device, compute.dtype))  # [b, T, H]
    return states


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_on(part, device) for part in value)
    return {name: _on(part, device) for name, part in value.items()} if isinstance(value, dict) else value
