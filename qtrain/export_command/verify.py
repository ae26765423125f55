"""`qtrain export verify`: the gate alone, on any quantised folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from qtrain.errors import UserError
from qtrain.export.completeness import check_complete
from qtrain.export.disk import sha256
from qtrain.export.merged_weights import MergedWeights
from qtrain.export.nf4_base import empty_model
from qtrain.export.quantized_checkpoint import QuantizedCheckpoint
from qtrain.export.structure import find_structure
from qtrain.export.verify import Bounds, Verdict, check_gate, measure, parse_gate

from .calibrate import RowsSettings, calibration_and_held_out, held_out_rows, text_windows
from .merge import merged_weights
from .quantize_options import CHOICES, one_of
from .rows import Windows, ends_of, held_out_windows, stop_check
from .source import Source, find_source
from .verdict import say, show_verdict, warn
from .verify_reader import check_readers, compare_reader

MANIFEST = "manifest.json"
ROWS, TOKENS = 8, 512


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """What the command line says."""

    reference: str | None = None
    gate: str | None = None
    data: list[str] = field(default_factory=list)
    rows: int | None = None  # as the export's, else ROWS
    tokens: int | None = None
    device: str = "auto"
    readers: list[str] = field(default_factory=list)


def export_verify(folder: Path, options: VerifyOptions, console: Console) -> Verdict:
    """Read a quantised folder back, and compare it with the model that it was made of.

    Raises:
        UserError, ExportError: it is damaged, or its reference or rows can't be had.
        GateFailed: it is below the gate, or a reader sees another model in it.
    """
    one_of("device", options.device, CHOICES["device"])
    check_readers(options.readers)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no config.json; give a quantised model folder")
    manifest = read_manifest(folder)
    bounds = _bounds(options, manifest)
    check_files(folder, manifest, console)
    quantized = QuantizedCheckpoint.open(folder)
    quantized.check_complete()
    say(console, f"{folder}: {quantized.version}, {len(quantized.schemes)} packed modules")
    source, weights = _reference(folder, options, manifest)
    check_complete(weights.checkpoint, empty_model(weights.folder))
    for line in source.notes:
        say(console, f"note: {line}")
    windows = _windows(source, options, manifest, weights)
    if options.rows is not None and len(windows.ids) < options.rows:
        found = f"{len(windows.ids)} rows, all that {', '.join(windows.files)} has for it"
        say(console, f"note: --rows is {options.rows}, measured on {found}; --data FILE gives others")
    stops = stop_check(source, folder)
    if stops["note"]:
        warn(console, stops["note"])
    has_cuda = torch.cuda.is_available()
    device = ("cuda" if has_cuda else "cpu") if options.device == "auto" else options.device
    verdict = measure(
        weights,
        folder,
        windows.ids,
        ends=ends_of(windows, stops),
        bounds=bounds,
        device=device,
        say=lambda line: say(console, f"measuring: {line}"),
    )
    show_verdict(verdict, windows, console)
    for reader in options.readers:
        compare_reader(reader, folder, windows.ids, torch.get_num_threads(), console)
    check_gate(verdict, folder)
    return verdict


def read_manifest(folder: Path) -> dict[str, Any]:
    """Of an export; empty where another program made the folder.

    Raises:
        UserError: it is no JSON object.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} can't be read: {error}; export the model again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is no JSON object; export the model again")
    return found


def check_files(folder: Path, manifest: Mapping[str, Any], console: Console) -> None:
    """Compare every file with the SHA-256 that the manifest has of it.

    Raises:
        UserError: weights or configuration are missing or changed; a changed tokenizer, say, is warned of.
    """
    weights: dict[str, str] = manifest.get("files", {}) | manifest.get("written_files", {})
    for name, digest in weights.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{folder}: {name} is missing; export the model again")
        if sha256(path) != digest:
            raise UserError(f"{path} is damaged: its SHA-256 is not the manifest's; export the model again")
    for name, digest in manifest.get("copied_files", {}).items():
        path = folder / name
        if not path.is_file() or sha256(path) != digest:
            what = "has changed since the export" if path.is_file() else "is missing"
            warn(console, f"{path} {what}")
    if not manifest:
        say(console, f"note: {folder} has no {MANIFEST}: files are not compared with hashes")


def _bounds(options: VerifyOptions, manifest: Mapping[str, Any]) -> Bounds | None:
    """--gate, else the bounds that the export was held to, else the defaults."""
    if options.gate is not None:
        return parse_gate(options.gate)
    result = manifest.get("gate", {}).get("result") or {}
    recorded = result.get("bounds")
    return Bounds(**recorded) if isinstance(recorded, dict) else Bounds()


def _reference(
    folder: Path, options: VerifyOptions, manifest: Mapping[str, Any]
) -> tuple[Source, MergedWeights]:
    if options.reference is not None:
        source = find_source(options.reference)
        if _weights_changed(source, manifest):
            source.notes.append(f"{source.base} is not the base that {folder} was made of (SHA-256 differs)")
        return source, merged_weights(source, "auto", "stored")
    base = manifest.get("base", {})
    name = manifest.get("run") or base.get("folder")
    if name is None:
        raise UserError(
            f"{folder} says nothing of the model that it was made of; name it: --reference RUN|MODEL"
        )
    adapter = None if manifest.get("run") else (manifest.get("adapter") or {}).get("folder")
    if not Path(name).is_dir():
        raise UserError(f"{name}, which {folder} was made of, is gone; name it: --reference RUN|MODEL")
    source = find_source(name, None if adapter is None else Path(adapter))
    changed = _weights_changed(source, manifest)
    if changed:
        raise UserError(
            f"{changed[0]} of {source.base} has changed since {folder} was made of it; "
            "name the model as it was: --reference RUN|MODEL"
        )
    weights = merged_weights(source, base.get("weights", "original"), "stored")
    return source, weights


def _weights_changed(source: Source, manifest: Mapping[str, Any]) -> list[str]:
    """The weight files of the manifest's base that are not the source's."""
    recorded: dict[str, str] = manifest.get("base", {}).get("files", {})
    return [
        file
        for file, digest in recorded.items()
        if file.endswith(".safetensors") and source.files.get(file) != digest
    ]


def _windows(
    source: Source, options: VerifyOptions, manifest: Mapping[str, Any], weights: MergedWeights
) -> Windows:
    """The export's rows, or `options.data`'s; as many as `options.rows` says, if there are as many."""
    settings = manifest.get("gate", {}).get("settings")
    if settings is not None and not options.data:
        windows = _export_rows(source, options, settings, weights)
    else:
        count, tokens = options.rows or ROWS, options.tokens or TOKENS
        rows = RowsSettings(1, tokens, [], 0, options.data, count, tokens)
        windows = text_windows(source, rows) or held_out_windows(source, options.data, count, tokens)
    if sum(map(len, windows.ids)) < 2:
        missing = windows.missing or "they hold a token each"
        raise UserError(f"no rows to measure on: {missing}; give --data FILE")
    kept = slice(options.rows)
    return replace(windows, ids=windows.ids[kept], learnt=windows.learnt[kept])


def _export_rows(
    source: Source, options: VerifyOptions, settings: Mapping[str, Any], weights: MergedWeights
) -> Windows:
    """What the export was measured on, and more of it where it was not kept back from the calibration."""
    rows = RowsSettings(
        calib=settings["calib"],
        length=settings["calib_length"],
        files=settings["calib_data"],
        seed=settings["seed"],
        data=settings["data"],
        rows=settings["rows"] or ROWS,  # which rows are kept back depends on it
        tokens=options.tokens or settings["tokens"],
    )
    more = replace(rows, rows=max(rows.rows, options.rows or 0))
    held_out = held_out_rows(source, more)
    if held_out is not None:
        return held_out
    return calibration_and_held_out(source, rows, find_structure(weights.folder).model.config)[1]
