"""`qtrain export merge`: base and adapter in one checkpoint, with what merging changed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from qtrain.errors import UserError
from qtrain.export.checkpoint import Checkpoint
from qtrain.export.completeness import check_complete
from qtrain.export.disk import check_room, free_bytes, parse_size, size_text
from qtrain.export.errors import ExportError
from qtrain.export.lock import only_one
from qtrain.export.lora import Adapter
from qtrain.export.merge import check_tied, merged_bytes, merged_config, parse_dtype, write_merged
from qtrain.export.merge_report import merge_report
from qtrain.export.merged_weights import BaseWeights, MergedWeights
from qtrain.export.nf4_base import NF4Settings, empty_model
from qtrain.export.writer import CheckpointWriter, check_free
from qtrain.runs.manifest import provenance

from .progress import shard_progress
from .rows import Windows, held_out_windows, stop_check
from .source import TEMPLATE, Source, find_source

BaseChoice = Literal["auto", "original", "dequantized"]
# measured on two cores (docs/benchmarks.md); for the estimate of a dry run only
DISK, SUMS, NF4 = (
    3e8,
    3e7,
    1e7,
)  # bytes read, checked, hashed and written; weights summed; weights quantised: a second
IMPORTS = 5 * 2**28  # bytes: torch, transformers, and what a merge allocates whatever the model's size


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """What the command line says."""

    base: BaseChoice = "auto"
    dtype: str = "stored"
    out: Path | None = None
    max_shard_size: str = "4GB"
    adapter: Path | None = None
    data: list[str] = field(default_factory=list)
    rows: int = 8
    tokens: int = 512
    force: bool = False
    dry_run: bool = False


def export_merge(name: str, options: MergeOptions, console: Console) -> Path | None:
    """Merge a run (or a model and an adapter) into a checkpoint; returns its folder, None for a dry run.

    Raises:
        UserError, ExportError: whatever stands in the way, in a line.
    """
    source = find_source(name, options.adapter)
    out = options.out or source.out("merged")
    source.check_apart(out)
    check_free(out, force=options.force)
    shard = parse_size(options.max_shard_size)
    weights = merged_weights(source, options.base, options.dtype)
    tied = check_tied(weights)
    check_room(merged_bytes(weights), out)
    unknown = _check_tensors(source, weights.checkpoint)
    for line in source.notes:
        _say(console, f"note: {line}")
    if options.dry_run:
        _show_plan(source, weights, out, shard, console)
        return None
    windows = held_out_windows(source, options.data, options.rows, options.tokens)
    if windows.ids and unknown is not None:
        raise ExportError(f"{unknown}; --rows 0 merges without measuring") from unknown
    with only_one(out), CheckpointWriter(out, max_shard_bytes=shard, force=options.force) as writer:
        with shard_progress(console, merged_bytes(weights)) as advance:
            write_merged(writer, weights, advance)
        writer.copy_side_files(source.base)
        if source.template is not None:
            writer.copy_as(source.template, TEMPLATE)
            _say(console, f"chat template: the run's own ({source.data.chat_template}), not the base's")
        folder = writer.seal(merged_config(weights))
        stops = stop_check(source, folder)
        report = _report(source, weights, folder, windows, console)
        manifest = _manifest(source, options, weights, writer) | {
            "tied_embeddings": tied,
            "stops": stops,
            "report": report,
        }
        writer.write_json("manifest.json", manifest)
        place = writer.publish()
    for note in (tied["note"], stops["note"]):
        if note:
            console.print(f"warning: {note}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    _show_result(place, writer, report, console)
    return place


def merged_weights(source: Source, choice: BaseChoice, dtype: str) -> MergedWeights:
    """The merged weights of a source, ready to be read.

    Args:
        choice: what the adapter is added to; auto: what it was trained on. On other weights it loses much of
            what it has learned (docs/benchmarks.md).

    Raises:
        UserError: a dequantised base is asked of a run that held it in 16 bits.
        ExportError: missing or damaged files, an adapter that does not fit.
    """
    nf4 = source.nf4()
    base = _chosen_base(source, choice)
    if base == "dequantized" and nf4 is None:
        if source.run is not None:
            raise UserError(
                f"--base dequantized: {source.name} held its base in 16 bits, so that there is nothing to "
                "dequantise; leave it out"
            )
        nf4 = NF4Settings(compute_dtype=source.compute_dtype())
        source.notes.append(
            f"{source.name} is no run: NF4 with double quantisation, as 4-bit training has it"
        )
    adapter = None if source.adapter is None else Adapter.open(source.adapter)
    return MergedWeights(Checkpoint.open(source.base), adapter, base=base, nf4=nf4, dtype=parse_dtype(dtype))


def _chosen_base(source: Source, choice: BaseChoice) -> BaseWeights:
    if choice != "auto":
        return choice
    if source.model.quantization != "nf4":
        return "original"
    source.notes.append(
        "merging into the dequantised NF4 that the adapter was trained on; --base original takes the 16-bit "
        "weights"
    )
    return "dequantized"


def _check_tensors(source: Source, checkpoint: Checkpoint) -> ExportError | None:
    """Refuse a base that lacks tensors; returns why its architecture can't be built, so not be measured."""
    try:
        model = empty_model(source.base)
    except ExportError as error:
        source.notes.append(f"tensors are not compared with config.json: {error}")
        return error
    note = check_complete(checkpoint, model, renamed=True)
    if note:
        source.notes.append(note)
    return None


def _report(
    source: Source, weights: MergedWeights, folder: Path, windows: Windows, console: Console
) -> dict[str, Any]:
    import torch

    found = windows.as_dict()
    if not windows.ids:
        _say(console, f"not measured: {windows.missing}")
        return found
    if not windows.held_out:
        _say(console, "note: the run has no held-out rows; measured on rows that it was trained on")
    trained_on = weights.nf4 if weights.base == "dequantized" and source.run is None else source.nf4()
    return found | merge_report(
        weights,
        folder,
        windows.ids,
        trained_on=trained_on,
        compute_dtype=source.compute_dtype(),
        device="cuda" if torch.cuda.is_available() else "cpu",
        say=lambda line: _say(console, f"measuring: {line}"),
    )


def _manifest(
    source: Source, options: MergeOptions, weights: MergedWeights, writer: CheckpointWriter
) -> dict[str, Any]:
    """Everything that the checkpoint depended on."""
    nf4 = None
    if weights.base == "dequantized":
        nf4 = {
            "double_quant": weights.nf4.double_quant,
            "blocksize": weights.nf4.blocksize,
            "compute_dtype": str(weights.nf4.compute_dtype).removeprefix("torch."),
        }
    adapter = weights.adapter
    return {
        "kind": "merge",
        **provenance(),
        "run": None if source.run is None else str(source.run.path),
        "base": {"name": source.model.name, "folder": str(source.base), "files": source.files},
        "adapter": None
        if adapter is None
        else {"folder": str(adapter.folder), "files": adapter.hashes(), "modules": len(adapter.shapes)},
        "options": {
            "base": weights.base,
            "dtype": options.dtype,
            "max_shard_size": options.max_shard_size,
            "nf4": nf4,
        },
        "notes": source.notes,
        "files": writer.hashes(),
        "copied_shards": writer.copied,
        "copied_files": writer.side_files,
    }


def _show_plan(source: Source, weights: MergedWeights, out: Path, shard: int, console: Console) -> None:
    checkpoint = weights.checkpoint
    changed = [name for name in checkpoint.specs if weights.changes(name)]
    copied = [file for file in checkpoint.files if not weights.touches(file)]
    size = merged_bytes(weights)
    shards = {
        file: sum(checkpoint.specs[name].nbytes for name in checkpoint.names_in(file))
        for file in checkpoint.files
    }
    largest = max((checkpoint.specs[name].nbytes for name in changed), default=0)
    numbers = sum(checkpoint.specs[name].nbytes // checkpoint.specs[name].dtype.itemsize for name in changed)
    quantised = numbers if weights.base == "dequantized" else 0
    seconds = size / DISK + numbers / SUMS + quantised / NF4
    adapter = weights.adapter
    lines = [
        f"base: {source.base} ({size_text(checkpoint.nbytes)} in {len(shards)} files), {weights.base}",
        "adapter: none" if adapter is None else f"adapter: {adapter.folder}, {len(adapter.shapes)} modules",
        f"writes: {out}, {size_text(size)} of weights in files of at most {size_text(shard)}; "
        f"{size_text(free_bytes(out))} are free there",
        f"recomputed: {len(changed)} of {len(checkpoint.specs)} tensors; copied byte for byte: "
        f"{len(copied)} of {len(shards)} files",
        f"peak memory: about {size_text(IMPORTS + max(shards.values()) + (6 if quantised else 2) * largest)}",
        f"time: about {seconds:.0f} s on two cores, without the measurement",
        "nothing was written",
    ]
    for line in lines:
        _say(console, line)


def _show_result(place: Path, writer: CheckpointWriter, report: dict[str, Any], console: Console) -> None:
    bases = report.get("bases", {})
    if bases:
        _say(
            console,
            f"adapter on ({report['adapter_on']}) against merged (* written), {report['tokens']} tokens:",
        )
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in ("merged onto", "KL", "worst KL", "top-1", "logit diff", "ppl on", "ppl merged"):
            table.add_column(heading, justify="left" if heading == "merged onto" else "right")
        for base, found in bases.items():
            table.add_row(
                f"{base}{' *' if found['written'] else ''}",
                f"{found['kl']:.2e}",
                f"{found['kl_max']:.2e}",
                f"{found['top1']:.2%}",
                f"{found['max_logit_difference']:.2e}",
                f"{found['perplexity_p']:.4f}",
                f"{found['perplexity_q']:.4f}",
            )
        console.print(table, highlight=False, markup=False)
    files = writer.hashes()
    size = sum((place / name).stat().st_size for name in files)
    count = f"{len(files)} file{'s' if len(files) > 1 else ''}"
    copied = f", {len(writer.copied)} copied as they were" if writer.copied else ""
    console.print(
        f"[green]wrote[/green] {place}: {size_text(size)} in {count}{copied}",
        highlight=False,
        soft_wrap=True,
    )


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)
