"""What an export of a few bits will do, settled and checked before the first layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from qtrain.export.assemble import planned_specs
from qtrain.export.calibration import Calibration
from qtrain.export.completeness import check_complete, check_numbers
from qtrain.export.containers import HEAD
from qtrain.export.disk import check_room, parse_size
from qtrain.export.errors import ExportError
from qtrain.export.formats.scheme import Scheme
from qtrain.export.layerwise import Compute, native_dtype
from qtrain.export.merge import check_tied, parse_dtype
from qtrain.export.merged_weights import MergedWeights
from qtrain.export.module_schemes import check_schemes, choose_schemes, reader_warnings
from qtrain.export.nf4_base import empty_model
from qtrain.export.structure import Structure, find_structure
from qtrain.export.writer import check_free
from qtrain.runs.manifest import versions

from .calibrate import calibration_and_held_out
from .merge import merged_weights
from .quantize_options import QuantizeOptions, Settings, check_options
from .rows import Windows
from .source import Source, find_source
from .verdict import say, warn


@dataclass(frozen=True)
class Job:
    """Everything that is settled before the first layer."""

    source: Source
    options: QuantizeOptions
    settings: Settings
    weights: MergedWeights
    structure: Structure
    schemes: dict[str, Scheme | None]
    calibration: Calibration
    held_out: Windows
    compute: Compute
    out: Path
    warnings: list[str]

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding."""
        return self.weights.checkpoint.ties_embeddings

    def key(self) -> dict[str, Any]:
        """What the journal's entries depend on."""
        adapter = self.weights.adapter
        found = versions()
        return {
            "algorithm": self.options.algorithm,
            "format": self.settings.container,
            "schemes": compact(self.schemes),
            "stage": asdict(self.settings.stage),
            "base": self.source.files,
            "weights": self.weights.base,
            "adapter": None if adapter is None else adapter.hashes(),
            "calibration": self.calibration.sha256,
            "device": self.compute.device.type,
            "dtype": str(self.compute.dtype).removeprefix("torch."),
            "versions": {name: found.get(name) for name in ("qtrain", "torch", "transformers")},
        }


def prepare(name: str, options: QuantizeOptions, console: Console) -> Job:
    """Settle everything and refuse what can't be done, before anything is written.

    Raises:
        UserError, ExportError: in a line.
    """
    settings = check_options(options)
    source = find_source(name, options.adapter)
    out = options.out or source.out(options.algorithm)
    source.check_apart(out)
    check_free(out, force=options.force)
    parse_size(options.max_shard_size)
    weights = merged_weights(source, options.base, "stored")
    check_tied(weights)
    compute = _compute(options)
    model = empty_model(source.base)
    note = check_complete(weights.checkpoint, model)
    if note:
        source.notes.append(note)
    structure = find_structure(source.base, model)
    shapes = {module: (its.out_features, its.in_features) for module, its in structure.linears().items()}
    if settings.lm_head:
        shapes[HEAD] = _head_shape(weights)
    schemes = choose_schemes(list(shapes), settings.scheme, settings.changes)
    check_schemes(settings.container, settings.scheme, schemes, shapes)
    warnings = reader_warnings(settings.container, schemes, tied=weights.checkpoint.ties_embeddings)
    calibration, held_out = calibration_and_held_out(source, settings.rows, structure.model.config)
    for line in [*source.notes, calibration.note()]:
        if line:
            say(console, f"note: {line}")
    for line in warnings:
        warn(console, line)
    specs = planned_specs(weights, schemes, settings.container)
    packed = sum(spec.nbytes for spec in specs if spec.name not in weights.checkpoint.specs)
    # the journal holds the packed tensors too, until the checkpoint is there
    check_room(sum(spec.nbytes for spec in specs) + packed, out)
    if not options.dry_run:
        check_numbers(weights.checkpoint)
    return Job(
        source,
        options,
        settings,
        weights,
        structure,
        schemes,
        calibration,
        held_out,
        compute,
        out,
        warnings,
    )


def _compute(options: QuantizeOptions) -> Compute:
    has_cuda = torch.cuda.is_available()
    if options.device == "cuda" and not has_cuda:
        raise ExportError("--device cuda: torch finds no GPU here; use --device cpu")
    device = ("cuda" if has_cuda else "cpu") if options.device == "auto" else options.device
    chosen = torch.device(device)
    dtype = None if options.dtype == "auto" else parse_dtype(options.dtype)
    return Compute(chosen, dtype or native_dtype(chosen))


def _head_shape(weights: MergedWeights) -> tuple[int, int]:
    spec = weights.checkpoint.specs.get(f"{HEAD}.weight")
    if spec is None or weights.checkpoint.ties_embeddings:
        raise ExportError(
            "--lm-head: the head is tied to the embedding, which stays in 16 bits; leave --lm-head out, "
            "or untie them in the base (tie_word_embeddings: false and an lm_head.weight of its own)"
        )
    rows, columns = spec.shape
    return rows, columns


def compact(schemes: dict[str, Scheme | None]) -> dict[str, Any]:
    """Scheme -> modules, the commonest first and without its modules' names."""
    by_scheme: dict[str, list[str]] = {}
    for module, its in schemes.items():
        text = "16 bits" if its is None else f"{its.bits} bits, group {its.group_size}"
        if its is not None:
            text += (
                f", {'symmetric' if its.symmetric else 'asymmetric'}{', desc_act' if its.desc_act else ''}"
            )
        by_scheme.setdefault(text, []).append(module)
    usual = max(by_scheme, key=lambda text: len(by_scheme[text]))
    return {text: "all others" if text == usual else modules for text, modules in by_scheme.items()}
