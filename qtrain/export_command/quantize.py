"""`qtrain export gptq` and `qtrain export awq`: a few bits a weight, measured before it gets its name."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from qtrain.errors import UserError
from qtrain.export.assemble import quantized_config, stored_dtype, write_quantized
from qtrain.export.containers import HEAD, pack, quantization_config
from qtrain.export.disk import parse_size, size_text
from qtrain.export.errors import ExportError
from qtrain.export.formats import gptq
from qtrain.export.head import quantize_head
from qtrain.export.journal import Journal
from qtrain.export.layerwise import quantize_layers
from qtrain.export.lock import only_one
from qtrain.export.verify import Verdict, check_gate, measure
from qtrain.export.writer import CheckpointWriter, check_free
from qtrain.runs.manifest import versions

from .progress import ModuleProgress, module_progress
from .quantize_job import Job, prepare
from .quantize_manifest import gate_record, manifest_of
from .quantize_options import QuantizeOptions
from .quantize_plan import show_plan
from .rows import ends_of, stop_check
from .source import TEMPLATE
from .verdict import say, show_verdict, warn


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
    with only_one(job.out):
        verdict, place = _export(job, options, console)
    if verdict is not None:
        check_gate(verdict, place)
    return place


def _export(job: Job, options: QuantizeOptions, console: Console) -> tuple[Verdict | None, Path]:
    """All of it, but for what the verdict means."""
    check_free(job.out, force=options.force)  # another export may have ended since
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
    return verdict, place


class Interrupted(UserError):
    """Ctrl-C."""

    exit_code = 130


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
        manifest = manifest_of(job, journal, writer, dtype, seconds)
        writer.write_json("manifest.json", manifest | {"stops": stops, "gate": gate_record(job, verdict)})
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


def _show_result(job: Job, place: Path, writer: CheckpointWriter, failed: bool, console: Console) -> None:
    size = sum((place / name).stat().st_size for name in writer.hashes())
    was = job.weights.checkpoint.nbytes
    word = "[yellow]kept[/yellow]" if failed else "[green]wrote[/green]"
    console.print(
        f"{word} {place}: {size_text(size)}, {size / was:.0%} of {size_text(was)}",
        highlight=False,
        soft_wrap=True,
    )
