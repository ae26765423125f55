"""`qtrain export gptq` and `qtrain export awq`: a few bits a weight, measured before it gets its name."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from qtrain.errors import UserError
from qtrain.export.assemble import (
    StoredDtype,
    planned_specs,
    quantized_config,
    stored_dtype,
    write_quantized,
)
from qtrain.export.calibration import Calibration
from qtrain.export.checkpoint import INDEX
from qtrain.export.containers import HEAD, pack, quantization_config
from qtrain.export.disk import check_room, parse_size, sha256, size_text
from qtrain.export.errors import ExportError
from qtrain.export.formats import gptq
from qtrain.export.formats.scheme import Scheme
from qtrain.export.head import quantize_head
from qtrain.export.journal import Journal
from qtrain.export.layerwise import Compute, quantize_layers
from qtrain.export.merge import check_tied, parse_dtype
from qtrain.export.merged_weights import MergedWeights
from qtrain.export.module_schemes import check_schemes, choose_schemes, reader_warnings
from qtrain.export.structure import Structure, find_structure
from qtrain.export.verify import Verdict, check_gate, measure
from qtrain.export.writer import CheckpointWriter, check_free
from qtrain.runs.manifest import provenance, versions

from .calibrate import calibration_and_held_out
from .merge import merged_weights
from .progress import ModuleProgress, module_progress
from .quantize_options import QuantizeOptions, Settings, check_options
from .quantize_plan import show_plan
from .rows import Windows, ends_of, stop_check
from .source import TEMPLATE, Source, find_source
from .verdict import say, show_verdict, warn


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
            "schemes": _compact(self.schemes),
            "stage": asdict(self.settings.stage),
            "base": self.source.files,
            "weights": self.weights.base,
            "adapter": None if adapter is None else adapter.hashes(),
            "calibration": self.calibration.sha256,
            "device": self.compute.device.type,
            "dtype": str(self.compute.dtype).removeprefix("torch."),
            "versions": {name: found.get(name) for name in ("qtrain", "torch", "transformers")},
        }


def export_quantized(name: str, options: QuantizeOptions, console: Console) -> Path | None:
    """Quantise a run or a model into a checkpoint; returns its folder, None for a dry run.

    Raises:
        UserError, ExportError: whatever stands in the way, in a line.
        GateFailed: the checkpoint is below the gate, and lies under `<name>.rejected`.
        Interrupted: by Ctrl-C, with what goes on from there.
    """
    job = prepare(name, options, console)
    if options.dry_run:
        show_plan(job, console)
        return None
    journal = Journal(job.out, job.key(), resume=options.resume, force=options.force and not options.resume)
    _one_thread_count(journal, console)
    try:
        begun = time.monotonic()
        _quantize(job, journal, console)
        verdict, place = _publish(job, journal, time.monotonic() - begun, console)
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped; finished layers are in {journal.folder}: "
            "the same command with --resume goes on from there"
        ) from None
    journal.remove()
    if verdict is not None:
        check_gate(verdict, place)
    return place


class Interrupted(UserError):
    """Ctrl-C."""

    exit_code = 130


def prepare(name: str, options: QuantizeOptions, console: Console) -> Job:
    """Settle everything and refuse what can't be done, before anything is written.

    Raises:
        UserError, ExportError: in a line.
    """
    settings = check_options(options)
    source = find_source(name, options.adapter)
    out = options.out or source.out(options.algorithm)
    check_free(out, force=options.force)
    parse_size(options.max_shard_size)
    weights = merged_weights(source, options.base, "stored")
    check_tied(weights)
    compute = _compute(options)
    structure = find_structure(source.base)
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
    dtype = torch.float32 if options.dtype == "auto" else parse_dtype(options.dtype)
    return Compute(torch.device(device), dtype or torch.float32)


def _head_shape(weights: MergedWeights) -> tuple[int, int]:
    spec = weights.checkpoint.specs.get(f"{HEAD}.weight")
    if spec is None or weights.checkpoint.ties_embeddings:
        raise ExportError(
            "--lm-head: the head is tied to the embedding, which stays in 16 bits; leave --lm-head out, "
            "or untie them in the base (tie_word_embeddings: false and an lm_head.weight of its own)"
        )
    rows, columns = spec.shape
    return rows, columns


def _one_thread_count(journal: Journal, console: Console) -> None:
    """Sums depend on how many threads share them: a resumed export takes as many as it was begun with."""
    if "begun" in journal:
        threads = int(journal.notes("begun")["threads"])
        if threads != torch.get_num_threads():
            say(console, f"note: {threads} threads, with which this export was begun")
            torch.set_num_threads(threads)
        return
    journal.save("begun", {}, {"threads": torch.get_num_threads()})


def _quantize(job: Job, journal: Journal, console: Console) -> None:
    """Every layer, and the head, into the journal."""
    settings = job.settings

    def packer(linear: Any, module: str) -> Any:
        return pack(settings.container, linear, module)

    head = job.schemes.get(HEAD)
    done = sum(f"layer-{index}" in journal for index in range(job.structure.count))
    if done:
        say(console, f"resumed: {done} of {job.structure.count} layers are done already")
    for name in journal.dropped:
        warn(console, f"{journal.folder}: {name} is damaged and is made again")
    with module_progress(console, job.structure.count, len(job.structure.linears()), done) as progress:
        quantize_layers(
            job.structure,
            job.weights,
            job.calibration.windows,
            {module: its for module, its in job.schemes.items() if module != HEAD},
            settings.stage,
            packer,
            journal,
            job.compute,
            progress.step,
        )
        if head is not None:
            progress.say(HEAD)
            quantize_head(job.structure, job.weights, head, settings.stage, packer, journal, job.compute)
    _show_notes(progress, console)


def _show_notes(progress: ModuleProgress, console: Console) -> None:
    """What was said of several modules in one line."""
    for note, count in Counter(note for _, note in progress.notes).items():
        first = next(module for module, its in progress.notes if its == note)
        more = f" (and {count - 1} more modules)" if count > 1 else ""
        warn(console, f"{first}{more}: {note}")


def _publish(job: Job, journal: Journal, seconds: float, console: Console) -> tuple[Verdict | None, Path]:
    """The checkpoint under its name, or under `<name>.rejected`."""
    dtype = stored_dtype(job.weights, job.schemes)
    if dtype.reason:
        warn(console, dtype.reason)
    quantization = quantization_config(
        job.settings.container,
        job.settings.scheme,
        job.schemes,
        damp=job.settings.stage.damp,
        meta={"quantizer": [f"qtrain:{versions()['qtrain']}"]},
    )
    size = parse_size(job.options.max_shard_size)
    with CheckpointWriter(job.out, max_shard_bytes=size, force=job.options.force) as writer:
        say(console, "writing the checkpoint")
        write_quantized(writer, journal, job.weights, dtype.dtype)
        writer.copy_side_files(job.source.base)
        if job.source.template is not None:
            writer.copy_as(job.source.template, TEMPLATE)
        if job.settings.container == "gptq":
            writer.write_json(gptq.CONFIG_FILE, quantization)
        folder = writer.seal(quantized_config(job.weights, dtype, quantization))
        stops = stop_check(job.source, folder)
        if stops["note"]:
            warn(console, stops["note"])
        verdict = _measure(job, folder, stops, console)
        failed = verdict is not None and bool(verdict.failures)
        manifest = _manifest(job, journal, writer, dtype, seconds)
        writer.write_json("manifest.json", manifest | {"stops": stops, "gate": _gate(job, verdict)})
        place = writer.publish(rejected=failed)
    if verdict is not None:
        show_verdict(verdict, job.held_out, console)
    _show_result(job, place, writer, failed, console)
    return verdict, place


def _measure(job: Job, folder: Path, stops: dict[str, Any], console: Console) -> Verdict | None:
    windows = job.held_out.ids
    if sum(map(len, windows)) < 2:
        if job.settings.bounds is not None:
            raise ExportError(f"the gate has no rows to measure on: {job.held_out.missing}; or --gate off")
        say(console, f"not measured: {job.held_out.missing}")
        return None
    if not job.held_out.held_out:
        say(console, "note: no rows were left to hold out; measured on rows that it was calibrated on")
    return measure(
        job.weights,
        folder,
        windows,
        ends=ends_of(job.held_out, stops),
        bounds=job.settings.bounds,
        device=job.compute.device,
        say=lambda line: say(console, f"measuring: {line}"),
    )


def _gate(job: Job, verdict: Verdict | None) -> dict[str, Any]:
    rows = job.settings.rows
    return job.held_out.as_dict() | {
        "settings": {
            "data": _absolute(rows.data),
            "rows": rows.rows,
            "tokens": rows.tokens,
            "calib_data": _absolute(rows.files),
            "calib": rows.calib,
            "calib_length": rows.length,
            "seed": rows.seed,
        },
        "result": None if verdict is None else verdict.as_dict(),
    }


def _absolute(names: list[str]) -> list[str]:
    """Files by their whole path, so that they are found from everywhere; names on the hub as they are."""
    return [str(Path(name).resolve()) if Path(name).is_file() else name for name in names]


def _manifest(
    job: Job, journal: Journal, writer: CheckpointWriter, dtype: StoredDtype, seconds: float
) -> dict[str, Any]:
    """Everything that the checkpoint depended on."""
    adapter = job.weights.adapter
    errors = {
        module: error
        for entry in journal.names()
        for module, error in journal.notes(entry).get("errors", {}).items()
    }
    return {
        "kind": job.options.algorithm,
        **provenance(),
        "run": None if job.source.run is None else str(job.source.run.path.resolve()),
        "source": job.source.name,
        "base": {
            "name": job.source.model.name,
            "folder": str(job.source.base.resolve()),
            "files": job.source.files,
            "weights": job.weights.base,
        },
        "adapter": None
        if adapter is None
        else {
            "folder": str(adapter.folder.resolve()),
            "files": adapter.hashes(),
            "modules": len(adapter.shapes),
        },
        "format": job.settings.container,
        "scheme": asdict(job.settings.scheme),
        "schemes": _compact(job.schemes),
        "settings": asdict(job.settings.stage),
        "calibration": job.calibration.as_dict(),
        "compute": {
            "device": str(job.compute.device),
            "dtype": str(job.compute.dtype).removeprefix("torch."),
        },
        "stored_dtype": asdict(dtype) | {"dtype": dtype.name},
        "errors": errors,
        "seconds": round(seconds, 1),
        "notes": [*job.source.notes, *job.warnings],
        "files": writer.hashes(),
        "written_files": {
            name: sha256(writer.partial / name)
            for name in ("config.json", gptq.CONFIG_FILE, INDEX)
            if (writer.partial / name).is_file()
        },
        "copied_files": writer.side_files,
    }


def _compact(schemes: dict[str, Scheme | None]) -> dict[str, Any]:
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


def _show_result(job: Job, place: Path, writer: CheckpointWriter, failed: bool, console: Console) -> None:
    size = sum((place / name).stat().st_size for name in writer.hashes())
    was = job.weights.checkpoint.nbytes
    word = "[yellow]kept[/yellow]" if failed else "[green]wrote[/green]"
    console.print(
        f"{word} {place}: {size_text(size)}, {size / was:.0%} of {size_text(was)}",
        highlight=False,
        soft_wrap=True,
    )
