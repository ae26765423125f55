"""`qtrain compare`: runs and base models side by side on the same held-out rows."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from qtrain.errors import UserError

from .terminal import console


def compare(
    subjects: Annotated[
        list[str],
        typer.Argument(metavar="RUN|MODEL...", help="Two or more; the others are held against the first."),
    ],
    data: Annotated[
        list[str] | None, typer.Option(help="Held-out rows (default: the runs' data.eval).")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N rows.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Cut answers there (default: 1.25 x the longest reference).")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows decoded at once, at most.")] = 64,
    html: Annotated[Path, typer.Option(help="Where the page with every differing row goes.")] = Path(
        "runs/compare.html"
    ),
    json: Annotated[bool, typer.Option("--json", help="Print JSON, every row in it.")] = False,
) -> None:
    """Hold runs and base models against each other on the same held-out rows.

    Exact checks, loss and preferences with intervals, and the rows in which they disagree: a few here, all on
    the page.
    """
    if len(subjects) < 2:
        raise UserError(
            f"compare needs two or more runs or models, got only {subjects[0]}; such as: demo runs/v1"
        )
    from qtrain.evaluation.compare import compare_subjects
    from qtrain.evaluation.evaluate import EvalSettings
    from qtrain.evaluation.page import prepare_place, write_page
    from qtrain.evaluation.tables import show_comparison

    say = Console(stderr=True) if json else console()
    settings = EvalSettings(limit=limit, max_new_tokens=max_new_tokens, batch_size=batch_size)
    prepare_place(html, "--html")
    result = compare_subjects(subjects, data or [], settings, say)
    write_page(result, html)
    if json:
        typer.echo(json_module.dumps(result, indent=2, ensure_ascii=False))
    else:
        show_comparison(result, say)
    say.print(f"page: {html}", highlight=False, markup=False, soft_wrap=True)
