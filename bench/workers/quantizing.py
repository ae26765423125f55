"""What the workers that quantise share: the job, the windows, the costs, the file they leave.

Standard library only at import: this runs in the peers' environments.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..measure import Cost, PeakMemory, Stopwatch
from .installed import versions

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "compressed-tensors",
    "gptqmodel",
    "llmcompressor",
    "auto-round",
    "numpy",
)


@dataclass(frozen=True, slots=True)
class Job:
    """One export of one variant.

    Attributes:
        model: the bf16 model's folder.
        windows: JSON file of the calibration's token ids.
        checkpoint: where the quantised model goes; not there yet.
        output: the JSON file to leave.
        scratch: an empty folder of this run's own.
        options: `method`, `group_size`, `symmetric`, `windows` where not all are wanted, and what the worker
            documents.
    """

    model: Path
    windows: Path
    checkpoint: Path
    output: Path
    scratch: Path
    options: dict[str, Any]

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return int(self.options["group_size"])

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is the middle everywhere."""
        return bool(self.options["symmetric"])

    def calibration(self) -> list[list[int]]:
        """Token ids, window by window, all of one length; only the first where `windows` says how many."""
        rows: list[list[int]] = json.loads(self.windows.read_text())
        return rows[: self.options.get("windows")]


def read_job() -> Job:
    """The job file named by the only argument."""
    raw = json.loads(Path(sys.argv[1]).read_text())
    options = raw.pop("options")
    return Job(**{name: Path(value) for name, value in raw.items()}, options=options)


@contextmanager
def measured(job: Job, settings: dict[str, Any]) -> Iterator[None]:
    """Times the block, from the model's folder to the checkpoint on disk, and writes the result.

    Enter it when the library is imported: its code is not memory that an export adds. CPU seconds are of
    this process and of those that it started and waited for.
    """
    memory = PeakMemory()
    before = _children_s()
    with Stopwatch() as watch:
        yield
    memory.close()
    cost = Cost(watch.cost.cpu_s + _children_s() - before, watch.cost.wall_s)
    result = asdict(cost) | {
        "baseline_bytes": memory.baseline,
        "peak_bytes": memory.peak(),
        "memory_method": memory.method,
        "settings": settings,
        "versions": versions(PACKAGES),
    }
    partial = job.output.with_suffix(".partial")
    partial.write_text(json.dumps(result))
    partial.rename(job.output)


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
