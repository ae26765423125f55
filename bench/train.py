"""`python -m qtrain.bench.train`: DPO and SFT steps of qtrain and of its peers, on CPU, in one run.

Every variant is a process of its own; the variants of a round run in random order, so that what the
machine does meanwhile meets all of them. `docs/benchmarks.md` says how to read the table.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .gate import check
from .launch import WorkerFailed, run_worker
from .peers.environments import CACHE
from .provenance import provenance
from .table import markdown_table, terminal_table
from .train_report import COLUMNS, against_best_peer, cells, long_rows
from .variants import TASKS, Variant, variants
from .workload import Workload, prepare

Sample = dict[str, Any]


def measure(
    tasks: list[str],
    chosen: list[str],
    *,
    rounds: int,
    steps: int,
    threads: int,
    timeout_s: float,
    work: Workload,
    cache: Path,
    console: Console,
) -> tuple[list[Sample], dict[str, Any]]:
    """All samples (one per process), and what the first steps were expected to be."""
    folder = prepare(work, cache.absolute() / "bench")
    shared: dict[str, Any] = {"folder": folder, "work": work, "threads": threads, "timeout_s": timeout_s}
    expected = run_worker(
        Path(sys.executable), "expected", task="all", dtype="fp32", options={}, steps=0, **shared
    )
    samples: list[Sample] = []
    plan = list(_plan(tasks, chosen, rounds, work.seed))
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


def _plan(tasks: list[str], chosen: list[str], rounds: int, seed: int) -> Iterator[tuple[str, int, Variant]]:
    """Task after task, each in rounds, each round in a random order of its own."""
    draw = random.Random(seed)
    for task in tasks:
        wanted = [
            variant
            for variant in variants(task)
            if not chosen or any(word in variant.name for word in chosen)
        ]
        for turn in range(rounds):
            yield from ((task, turn, variant) for variant in draw.sample(wanted, len(wanted)))


def main(
    out: Annotated[Path | None, typer.Option(help="Write everything, raw samples included, as JSON.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables as Markdown.")] = None,
    task: Annotated[
        list[str] | None, typer.Option(help=f"Any of: {', '.join(TASKS)}; default dpo and sft.")
    ] = None,
    variant: Annotated[
        list[str] | None, typer.Option(help="Only variants whose name contains this; repeatable.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Processes of each variant.")] = 2,
    steps: Annotated[
        int, typer.Option(min=1, help="Timed steps of each process, after one warm-up step.")
    ] = 3,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that one process may take.")] = 900,
    seed: Annotated[int, typer.Option(min=0, help="Of the model, the rows and the order.")] = 0,
    cache: Annotated[Path, typer.Option(help="Holds the model and the peers' environments.")] = CACHE,
) -> None:
    """Compare qtrain's training steps with TRL's and unsloth's: CPU seconds, memory, and the losses."""
    console = Console(stderr=True)
    tasks = task or ["dpo", "sft"]
    unknown = [name for name in tasks if name not in TASKS]
    if unknown:
        console.print(f"--task {unknown[0]}: there is {', '.join(TASKS)}", style="red", highlight=False)
        raise typer.Exit(2)
    work = Workload(seed=seed)
    about = provenance()
    try:
        samples, expected = measure(
            tasks,
            variant or [],
            rounds=rounds,
            steps=steps,
            threads=threads,
            timeout_s=timeout,
            work=work,
            cache=cache,
            console=console,
        )
    except WorkerFailed as error:
        console.print(f"the expected first step can't be computed: {error}", style="red", markup=False)
        raise typer.Exit(1) from None
    rows = long_rows(samples, seed=seed)
    if out is not None:
        protocol = {
            "threads": threads,
            "rounds": rounds,
            "timed_steps": steps,
            "warm_up_steps": 1,
            "order": "variants of a round in random order, one process each",
            "seed": seed,
        }
        report = {
            "kind": "train",
            "provenance": about,
            "protocol": protocol,
            "workload": asdict(work),
            "expected": expected,
            "rows": rows,
            "samples": samples,
        }
        out.write_text(json.dumps(report, indent=1) + "\n")
        console.print(f"wrote {out}", highlight=False)
    lines = {
        name: [
            line for dtype in ("bf16", "fp32") if (line := against_best_peer(samples, name, dtype, seed=seed))
        ]
        for name in tasks
    }
    _show(tasks, rows, lines, markdown)


def _show(
    tasks: list[str], rows: list[dict[str, Any]], notes: dict[str, list[str]], markdown: Path | None
) -> None:
    screen = Console(width=None if sys.stdout.isatty() else 200)
    parts = []
    for name in tasks:
        lines = [cells(row) for row in rows if row["task"] == name]
        screen.print(terminal_table(name.upper(), COLUMNS, lines))
        for note in notes[name]:
            screen.print(note, highlight=False, markup=False)
        listed = "".join(f"- {note}\n" for note in notes[name])
        parts.append(f"### {name.upper()}\n\n{markdown_table(COLUMNS, lines)}\n{listed}")
    if markdown is not None:
        markdown.write_text("\n".join(parts))


if __name__ == "__main__":
    typer.run(main)
