"""`qtrain bench train`: training steps of qtrain and of its peers."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .peers.environments import CACHE
from .variants import AGAIN, BASELINE, OURS, TASKS, variants


def train(
    out: Annotated[Path | None, typer.Option(help="Write everything, raw samples included, as JSON.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables as Markdown.")] = None,
    task: Annotated[
        list[str] | None, typer.Option(help=f"Any of: {', '.join(TASKS)}; default dpo and sft.")
    ] = None,
    variant: Annotated[
        list[str] | None, typer.Option(help="Only variants whose name contains this; repeatable.")
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="SFT: one process of TRL, two of qtrain."),
    ] = False,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Processes of each variant.", show_default="2")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Timed steps of each process, after one warm-up step.", show_default="3"),
    ] = None,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that one process may take.")] = 900,
    seed: Annotated[int, typer.Option(min=0, help="Of the model, the rows and the order.")] = 0,
    cache: Annotated[Path, typer.Option(help="Holds the model and the peers' environments.")] = CACHE,
) -> None:
    """Compare qtrain's training steps with TRL's and unsloth's: CPU seconds, memory, and the losses.

    Every variant is a process of its own. One whose first losses are not those of plain fp32 PyTorch gets no
    speed; a peer that is not installed is a row that says so. Exit code 1: a variant of qtrain's own is wrong
    or fails.
    """
    console = Console(stderr=True)
    tasks = task or (["sft"] if quick else ["dpo", "sft"])
    chosen = variant or ([BASELINE, OURS] if quick else [])
    unknown = [name for name in tasks if name not in TASKS]
    if unknown:
        _refuse(console, f"--task {unknown[0]}: there is {', '.join(TASKS)}")
    names = [its.name for name in tasks for its in variants(name)]
    for word in variant or []:
        if not any(word in name for name in names):
            _refuse(console, f"--variant {word}: there is {', '.join(dict.fromkeys(names))}")
    for option, path in (("--out", out), ("--markdown", markdown)):
        if path is not None and not path.absolute().parent.is_dir():
            _refuse(console, f"{option} {path}: there is no folder {path.parent}")
    exact = () if variant or not quick else (BASELINE, OURS, AGAIN)
    rows = _measure(
        console,
        tasks,
        chosen,
        exact=exact,
        rounds=rounds or (1 if quick else 2),
        steps=steps or (1 if quick else 3),
        threads=threads,
        timeout_s=timeout,
        seed=seed,
        cache=cache,
        out=out,
        markdown=markdown,
    )
    broken = ("ok", "not installed", "installed from")
    raise typer.Exit(int(any(r["worker"] == "ours" and not r["status"].startswith(broken) for r in rows)))


def _measure(
    console: Console,
    tasks: list[str],
    chosen: list[str],
    *,
    exact: tuple[str, ...],
    rounds: int,
    steps: int,
    threads: int,
    timeout_s: float,
    seed: int,
    cache: Path,
    out: Path | None,
    markdown: Path | None,
) -> list[dict[str, Any]]:
    from .launch import WorkerFailed
    from .provenance import provenance
    from .train import measure
    from .train_report import against_best_peer, long_rows
    from .workload import Workload

    work, about = Workload(seed=seed), provenance()
    try:
        samples, expected = measure(
            tasks, chosen, exact=exact, rounds=rounds, steps=steps, threads=threads, timeout_s=timeout_s,
            work=work, cache=cache, console=console,
        )  # fmt: skip
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
    return rows


def _show(
    tasks: list[str], rows: list[dict[str, Any]], notes: dict[str, list[str]], markdown: Path | None
) -> None:
    from .table import markdown_table, terminal_table
    from .train_report import COLUMNS, cells

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


def _refuse(console: Console, line: str) -> None:
    console.print(line, style="red", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(2)
