"""`qtrain bench checkpoints`: the forms of one run side by side."""

from __future__ import annotations

import json as json_module
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from qtrain.errors import UserError

ENGINES = ("transformers", "vllm")
# of --quick
QUICK = {
    "limit": 4,
    "rows": 2,
    "tokens": 128,
    "samples": 3,
    "rounds": 1,
    "prompt_tokens": 32,
    "new_tokens": 8,
}


def checkpoints(
    source: Annotated[
        str,
        typer.Argument(metavar="RUN|MODEL", help="A finished run, or a model: folder, hub name, demo."),
    ],
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[DIR]...", help="Exported folders besides those in RUN/export."),
    ] = None,
    engine: Annotated[
        list[str] | None, typer.Option(help="transformers, vllm; repeatable (default: both).")
    ] = None,
    data: Annotated[list[str] | None, typer.Option(help="Rows (default: the run's held-out rows).")] = None,
    limit: Annotated[int | None, typer.Option(min=0, help="Rows of the task score [40].")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Cut answers there (default: 1.25 x the longest reference).")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Rows for KL and perplexity [8].")] = None,
    tokens: Annotated[int | None, typer.Option(min=2, help="Cut those rows there [512].")] = None,
    gate: Annotated[
        str | None,
        typer.Option(help="What a checkpoint must keep to; off.", show_default="kl=0.25,ppl=1.25"),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Requests at once, besides one alone.")] = 4,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Of a request for speed [128].")] = None,
    new_tokens: Annotated[int | None, typer.Option(min=1, help="Made behind its first [32].")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Timed requests of a process [15].")] = None,
    budget: Annotated[
        float, typer.Option(min=0, help="Seconds of a process for the requests of one batch size.")
    ] = 60,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Processes of each checkpoint and engine [2].")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of an engine on the CPU.")] = min(
        os.cpu_count() or 1, 8
    ),
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that one process may take.")] = 3600,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of the requests and the order.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few rows, short requests, one process each.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "--json", help="Write rows, raw samples, provenance as JSON.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables as Markdown.")] = None,
    cache: Annotated[Path, typer.Option(help="Holds the engines' environments.")] = Path(".cache"),
) -> None:
    """Size, quality, memory, speed and task score of a run in 16 bits, NF4, GPTQ and AWQ.

    KL and perplexity are of the files' bytes, read by this project. Every engine is a process of its own, and
    one that serves something else than the files hold, or a checkpoint below the gate, gets no speed. Exit
    code 1: a checkpoint is wrong or fails.
    """
    _check_choices(engine or [], device)
    for option, path in (("--out", out), ("--markdown", markdown)):
        if path is not None and not path.absolute().parent.is_dir():
            raise UserError(f"{option} {path}: there is no folder {path.parent}")
    from qtrain.bench.results import BROKEN
    from qtrain.checkpoint_bench.options import Options
    from qtrain.checkpoint_bench.run import bench_checkpoints

    sizes = {
        "limit": limit,
        "rows": rows,
        "tokens": tokens,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "samples": samples,
        "rounds": rounds,
    }
    given: dict[str, Any] = {name: value for name, value in sizes.items() if value is not None}
    options = Options(
        folders=folders or [],
        engines=tuple(name for name in ENGINES if name in (engine or ENGINES)),  # type: ignore[misc]
        data=data or [],
        max_new_tokens=max_new_tokens,
        gate=gate,
        batch=batch,
        threads=threads,
        timeout_s=timeout,
        budget_s=budget,
        device=device,
        seed=seed,
        cache=cache,
        **((QUICK if quick else {}) | given),
    )
    console = Console(stderr=True, highlight=False)

    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    report = bench_checkpoints(source, options, say)
    if out is not None:
        _write(out, json_module.dumps(report, indent=1) + "\n")
        say(f"wrote {out}")
    text = _show(report)
    if markdown is not None:
        _write(markdown, text)
    raise typer.Exit(int(any(row["status"].startswith(BROKEN) for row in report["rows"])))


def _check_choices(engines: list[str], device: str) -> None:
    for name in engines:
        if name not in ENGINES:
            raise UserError(f"--engine {name}: there is {', '.join(ENGINES)}")
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device}: there is auto, cpu, cuda")


def _write(path: Path, text: str) -> None:
    from qtrain.runs.atomic import disk_errors

    with disk_errors("the result", path):
        path.write_text(text, encoding="utf-8")


def _show(report: dict[str, Any]) -> str:
    """The tables on the screen; returns them as Markdown."""
    from qtrain.bench.checkpoint_table import notes, tables
    from qtrain.bench.table import markdown_table, terminal_table

    screen = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    parts = []
    for title, columns, lines in tables(report["rows"]):
        screen.print(terminal_table(title, columns, lines), markup=False)
        parts.append(f"### {title}\n\n{markdown_table(columns, lines)}")
    found = notes(report["rows"])
    for line in found:
        screen.print(line, markup=False, soft_wrap=True)
    return "\n".join([*parts, "".join(f"- {line}\n" for line in found)])
