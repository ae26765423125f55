"""One export by this project: `qtrain export gptq` or `awq` with the command line's own defaults.

Only the calibration rows are handed in as token windows, the same ones that the peers get. The gate is off:
the peers measure nothing. Options: `method`, and `words`, further words of the command line.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers.models.qwen2.modeling_qwen2  # noqa: F401  # a library's code is not what an export adds

import qtrain.export_command.quantize_job as command
from qtrain.cli import main as qtrain
from qtrain.export.calibration import Calibration
from qtrain.export_command.rows import Windows

from .quantizing import Job, measured, read_job


def main() -> None:
    """Run the command."""
    job = read_job()
    calibration = _calibration(job)
    vars(command)["calibration_and_held_out"] = _handed_in(calibration)
    words = ["export", job.options["method"], str(job.model), "--group-size", str(job.group_size)]
    words += ["--gate", "off", "--rows", "0", "--device", "cpu", "--out", str(job.checkpoint)]
    # there is always a file to name; its content is replaced by the windows
    words += ["--calib-data", str(job.windows), *job.options.get("words", [])]
    settings: dict[str, Any] = {"command": ["qtrain", *(Path(word).name for word in words)]}
    with measured(job, settings):
        try:
            qtrain(words)
        except SystemExit as stop:
            if stop.code:
                raise
        manifest = json.loads((job.checkpoint / "manifest.json").read_text())
        if manifest["calibration"]["sha256"] != calibration.sha256:
            raise RuntimeError("the export was calibrated on other windows than those of the benchmark")
        settings |= {key: manifest[key] for key in ("format", "scheme", "settings", "compute")}


def _calibration(job: Job) -> Calibration:
    windows = torch.tensor(job.calibration())
    count = len(windows)
    return Calibration(windows, count, count, count, seed=0, source=job.windows.name)


def _handed_in(calibration: Calibration) -> Any:
    def calibration_and_held_out(*_: Any) -> tuple[Calibration, Windows]:
        return calibration, Windows([], [], held_out=False, missing="the benchmark measures by itself")

    return calibration_and_held_out


if __name__ == "__main__":
    main()
