"""One `qtrain export` of a model without a tokenizer: its peak memory above torch's import, its time.

The job: `model`, `checkpoint`, `words` (of the command line), `calibration` and `held_out` (token ids, window
by window), `output`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from ..measure import PeakMemory, Stopwatch


def main() -> None:
    """Run the command."""
    job = json.loads(Path(sys.argv[1]).read_text())
    memory = PeakMemory()
    import qtrain.export_command.quantize_job as command
    from qtrain.cli import main as qtrain

    vars(command)["calibration_and_held_out"] = lambda *_: _windows(job)
    with Stopwatch() as watch:
        try:
            qtrain(["export", *job["words"], job["model"], "--device", "cpu", "--out", job["checkpoint"]])
        except SystemExit as stop:
            if stop.code:
                raise
    memory.close()
    manifest = json.loads((Path(job["checkpoint"]) / "manifest.json").read_text())
    found = {
        "baseline_bytes": memory.baseline,
        "peak_bytes": memory.peak(),
        "memory_method": memory.method,
        "wall_s": watch.cost.wall_s,
        "cpu_s": watch.cost.cpu_s,
        "settings": {key: manifest[key] for key in ("format", "scheme", "settings", "compute")},
    }
    Path(job["output"]).write_text(json.dumps(found))


def _windows(job: dict[str, Any]) -> tuple[Any, Any]:
    from qtrain.export.calibration import Calibration
    from qtrain.export_command.rows import Windows

    windows = torch.tensor(job["calibration"])
    count = len(windows)
    held_out = Windows(job["held_out"], [], held_out=True)
    return Calibration(windows, count, count, count, seed=0, source="random tokens"), held_out


if __name__ == "__main__":
    main()
