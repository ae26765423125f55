"""The command `compare`: of `qtrain bench`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer


def compare(
    a: Annotated[Path, typer.Argument(metavar="A.json", help="A result of qtrain bench: the one before.")],
    b: Annotated[
        Path, typer.Argument(metavar="B.json", help="Another of the same benchmark: the one after.")
    ],
    figure: Annotated[
        list[str] | None, typer.Option(help="Only these figures, such as time or memory; repeatable.")
    ] = None,
    noise_floor: Annotated[
        float, typer.Option(min=0, max=10, help="Least difference that counts, as a share of A's.")
    ] = 0.01,
    force: Annotated[bool, typer.Option("--force", help="Across devices, threads and settings too.")] = False,
    allow_drift: Annotated[
        bool,
        typer.Option("--allow-drift", help="Add what the other variants' times moved to the noise floor."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Hold two results of one benchmark against each other: ratios of medians with intervals, and verdicts.

    Exit code 1: something is worse in B, by more than its interval and the noise floor of its A/A run.
    """
    from rich.console import Console

    from .compare import compare
    from .result_files import read_results
    from .results import ResultsError

    say = Console(stderr=True, highlight=False)
    try:
        found = compare(
            read_results(a),
            read_results(b),
            force=force,
            figures=figure or (),
            least_floor=noise_floor,
            allow_drift=allow_drift,
        )
    except ResultsError as error:
        say.print(str(error), style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    if json:
        from json import dumps

        from .compare_json import as_json

        typer.echo(dumps(as_json(found), indent=1))
    else:
        from .compare_table import show

        width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160
        show(found, Console(width=width, highlight=False))
    raise typer.Exit(int(bool(found.regressions)))
