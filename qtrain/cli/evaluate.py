"""`qtrain eval`: score one run or base model on held-out rows."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .terminal import console


def evaluate(
    subject: Annotated[
        str,
        typer.Argument(metavar="RUN|MODEL", help="A run directory, or a base model: hub name, folder, demo."),
    ],
    data: Annotated[
        list[str] | None, typer.Option(help="Held-out rows (default: the run's data.eval).")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N rows.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Cut answers there (default: 1.25 x the longest reference).")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows decoded at once, at most.")] = 64,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, every row in it.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the JSON to this file as well.")] = None,
) -> None:
    """Score a run or a base model on held-out rows: exact checks, perplexity, preference accuracy.

    A run evaluated on its own held-out rows keeps the result in RUN/eval.json, which `qtrain runs` shows.
    """
    from qtrain.evaluation.evaluate import EvalSettings, evaluate_one
    from qtrain.evaluation.page import prepare_place
    from qtrain.evaluation.tables import show_evaluation
    from qtrain.runs.atomic import disk_errors, write_json

    say = Console(stderr=True) if json else console()
    settings = EvalSettings(limit=limit, max_new_tokens=max_new_tokens, batch_size=batch_size)
    if out is not None:
        prepare_place(out, "--out")
    result = evaluate_one(subject, data or [], settings, say)
    if out is not None:
        with disk_errors("the evaluation", out):
            write_json(out, result)
    if json:
        typer.echo(json_module.dumps(result, indent=2, ensure_ascii=False))
    else:
        show_evaluation(result, say)
