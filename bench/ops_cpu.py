"""`python -m qtrain.bench.ops_cpu`: the ops on this CPU against what they stand in for, forward + backward.

CPU seconds of the whole process (medians, the two interleaved in random order), and the peak of resident
memory above what was there before. Results are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from qtrain.kernels.cpu_matmul import multiplies_bf16

from .measure import PeakMemory, Stopwatch
from .ops_cpu_cases import WIDTHS, Case, logprob_case, lora_cases
from .provenance import provenance
from .statistics import ratio_of_medians
from .table import Column, figure, terminal_table

MIB = 1 << 20
PEAKS = 3  # the allocator's habits differ from call to call: the median of so many
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class Row:
    """One case, measured."""

    case: str
    dtype: str
    theirs: str
    difference: float  # relative, of the results
    ours_cpu_s: list[float]
    theirs_cpu_s: list[float]
    ours_peak_bytes: int
    theirs_peak_bytes: int

    @property
    def time(self) -> Any:
        """ours / theirs, with a 95 % interval."""
        return ratio_of_medians([self.ours_cpu_s], [self.theirs_cpu_s])

    @property
    def memory(self) -> float:
        """ours / theirs."""
        return self.ours_peak_bytes / max(self.theirs_peak_bytes, 1)


def measure(case: Case, rounds: int, seed: int = 0) -> Row:
    """Check, warm up, time `rounds` of each in random order, then the peak of memory of each."""
    difference = case.check()
    variants: dict[str, Callable[[], Sequence[Tensor]]] = {"ours": case.ours, "theirs": case.theirs}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    draw = random.Random(seed)
    for round_number in range(rounds + 1):
        for name in draw.sample(list(variants), len(variants)):
            with Stopwatch() as watch:
                variants[name]()
            if round_number:  # the first warms up
                seconds[name].append(watch.cost.cpu_s)
    peaks = {name: sorted(_peak(run) for _ in range(PEAKS))[PEAKS // 2] for name, run in variants.items()}
    dtype = next(name for name, value in DTYPES.items() if value == case.dtype)
    return Row(
        case.name,
        dtype,
        case.theirs_name,
        difference,
        seconds["ours"],
        seconds["theirs"],
        peaks["ours"],
        peaks["theirs"],
    )


def _peak(run: Callable[[], Sequence[Tensor]]) -> int:
    memory = PeakMemory()
    try:
        run()
        return memory.added()
    finally:
        memory.close()


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """Those asked for; made one after the other, so that one is in memory at a time."""
    for dtype in arguments.dtypes:
        if "lora_linear" in arguments.ops:
            for model in arguments.models:
                for rows in arguments.rows:
                    yield from lora_cases(model, rows, DTYPES[dtype])
        if "linear_logprob" in arguments.ops:
            yield logprob_case(1024, WIDTHS["0.5B"]["hidden"], 151936, DTYPES[dtype])


def _table(rows: Sequence[Row]) -> Any:
    columns = [
        Column("case", numeric=False),
        Column("dtype", numeric=False),
        Column("theirs", numeric=False),
        Column("theirs ms"),
        Column("ours ms"),
        Column("time"),
        Column("95 %"),
        Column("theirs MiB"),
        Column("ours MiB"),
        Column("memory"),
    ]
    return terminal_table("CPU time and peak memory, ours / theirs", columns, [_cells(row) for row in rows])


def _cells(row: Row) -> list[str]:
    time = row.time
    return [
        row.case,
        row.dtype,
        row.theirs,
        figure(1e3 * sorted(row.theirs_cpu_s)[len(row.theirs_cpu_s) // 2]),
        figure(1e3 * sorted(row.ours_cpu_s)[len(row.ours_cpu_s) // 2]),
        figure(time.estimate, 2),
        f"{time.low:.2f}-{time.high:.2f}",
        figure(row.theirs_peak_bytes / MIB, 0),
        figure(row.ours_peak_bytes / MIB, 0),
        figure(row.memory, 2),
    ]


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print a table, write JSON if asked to."""
    parser = argparse.ArgumentParser(prog="python -m qtrain.bench.ops_cpu", description=__doc__)
    native = multiplies_bf16()
    parser.add_argument("--ops", nargs="+", choices=["lora_linear", "linear_logprob"], default=None)
    parser.add_argument("--models", nargs="+", choices=list(WIDTHS), default=list(WIDTHS))
    parser.add_argument("--rows", nargs="+", type=int, default=[512, 2048])
    default = ["bf16", "fp32"] if native else ["fp32"]
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=default)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, default=None, help="where to write all samples")
    arguments = parser.parse_args(words)
    arguments.ops = arguments.ops or ["lora_linear", "linear_logprob"]
    torch.set_num_threads(arguments.threads)
    rows = []
    progress = Console(stderr=True)
    for case in cases(arguments):
        row = measure(case, arguments.rounds)
        progress.print(f"{row.case} {row.dtype}: time {row.time.estimate:.2f}, memory {row.memory:.2f}")
        rows.append(row)
    Console(width=None if sys.stdout.isatty() else 140).print(_table(rows))
    if arguments.json is not None:
        found = {**provenance(), "threads": arguments.threads, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
