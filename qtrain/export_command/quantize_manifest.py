"""What an export of a few bits depended on, for its manifest."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from qtrain.export.assemble import StoredDtype
from qtrain.export.checkpoint import INDEX
from qtrain.export.disk import sha256
from qtrain.export.formats import gptq
from qtrain.export.journal import Journal
from qtrain.export.verify import Verdict
from qtrain.export.writer import CheckpointWriter
from qtrain.runs.manifest import provenance

from .quantize_job import Job, compact


def gate_record(job: Job, verdict: Verdict | None) -> dict[str, Any]:
    """What was measured, and how the same rows are found again."""
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


def manifest_of(
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
        "schemes": compact(job.schemes),
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
