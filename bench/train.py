"""DPO and SFT steps of qtrain and of its peers, on CPU, in one run.

Every variant is a process of its own; the variants of a round run in random order, so that what the
machine does meanwhile meets all of them. `docs/benchmarks.md` says how to read the table.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from .gate import check
from .launch import WorkerFailed, run_worker
from .variants import Variant, variants
from .workload import Workload, prepare

Sample = dict[str, Any]


def measure(
    tasks: list[str],
    chosen: list[str],
    *,
    exact: tuple[str, ...] = (),
    rounds: int,
    steps: int,
    threads: int,
    timeout_s: float,
    work: Workload,
    cache: Path,
    console: Console,
) -> tuple[list[Sample], dict[str, Any]]:
    """All samples (one per process), and what the first steps were expected to be.

    `chosen` are words that a variant's name contains (none: all of them), `exact` whole names.
    """
    folder = prepare(work, cache.absolute() / "bench")
    shared: dict[str, Any] = {"folder": folder, "work": work, "threads": threads, "timeout_s": timeout_s}
    expected = run_worker(
        Path(sys.executable), "expected", task="all", dtype="fp32", options={}, steps=0, **shared
    )
    samples: list[Sample] = []
    plan = list(_plan(tasks, chosen, rounds, work.seed, exact))
    for number, (task, turn, variant) in enumerate(plan, 1):
        sample: Sample = {"task": task, "round": turn, "order": number, **asdict(variant)}
        missing = variant.missing(cache)
        if missing is None:
            try:
                result = run_worker(
                    variant.python(cache),
                    variant.worker,
                    task=task,
                    dtype=variant.dtype,
                    options=variant.options,
                    steps=steps,
                    **shared,
                )
                sample |= {"result": result, "status": check(task, result, expected[task]) or "ok"}
            except WorkerFailed as error:
                sample["status"] = f"failed: {error}"
        else:
            sample["status"] = missing
        samples.append(sample)
        progress = f"{number}/{len(plan)} {task} round {turn + 1} {variant.name}: {sample['status']}"
        console.print(progress, highlight=False, markup=False)
    return samples, expected


def _plan(
    tasks: list[str], chosen: list[str], rounds: int, seed: int, exact: tuple[str, ...] = ()
) -> Iterator[tuple[str, int, Variant]]:
    """Task after task, each in rounds, each round in a random order of its own."""
    draw = random.Random(seed)
    for task in tasks:
        wanted = [
            variant
            for variant in variants(task)
            if (not chosen or any(word in variant.name for word in chosen))
            and (not exact or variant.name in exact)
        ]
        for turn in range(rounds):
            yield from ((task, turn, variant) for variant in draw.sample(wanted, len(wanted)))


if __name__ == "__main__":
    import typer

    from .train_command import train

    typer.run(train)
