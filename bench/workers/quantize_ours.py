"""One export by this project: `qtrain export gptq` or `awq` with the command line's own defaults.

Only the calibration rows are handed in as token windows, the same ones that the peers get. The gate is off:
the peers measure nothing. Options: `method`, and `words`, further words of the command line.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers.models.qwen2.modeling_qwen2  # noqa: F401  # a library's code is not what an export adds

import qtrain.export_command.quantize as command
from qtrain.cli import main as qtrain
from qtrain.export.calibration import Calibration
from qtrain.export_command.rows import Windows

from .quantizing import Job, measured, read_job


def main() -> None:
    """Run the command."""
    job = read_job()
    vars(command)["calibration_and_held_out"] = _windows(job)
    words = ["export", job.options["method"], str(job.model), "--group-size", str(job.group_size)]
    words += ["--gate", "off", "--rows", "0", "--device", "cpu", "--out", str(job.checkpoint)]
    # there is always a file to name; its content is replaced by the windows
    words += ["--calib-data", str(job.windows), *job.options.get("words", [])]
    with measured(job, {"command": ["qtrain", *words]}):
        try:
            qtrain(words)
        except SystemExit as stop:
            if stop.code:
                raise


def _windows(job: Job) -> Any:
    def calibration_and_held_out(*_: Any) -> tuple[Calibration, Windows]:
        windows = torch.tensor(job.calibration())
        count = len(windows)
        calibration = Calibration(windows, count, count, count, seed=0, source=job.windows.name)
        return calibration, Windows([], [], held_out=False, missing="the benchmark measures by itself")

    return calibration_and_held_out


if __name__ == "__main__":
    main()
