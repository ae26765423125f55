"""`qtrain runs`: the run directories and where they stand."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from .terminal import console


def runs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder that holds the runs.")] = Path(
        "runs"
    ),
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the runs: parent, method, base, state, steps, final loss, eval score, size."""
    from qtrain.runs.listing import as_dict, list_runs, show_runs

    found = list_runs(folder)
    if json:
        typer.echo(json_module.dumps([as_dict(run) for run in found], indent=2, ensure_ascii=False))
    else:
        show_runs(found, folder, console())
