"""The command `report`: of `qtrain bench`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

FOLDER = Path("docs/benchmarks")


def report(
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FILES...]", help=f"Results, folders of them, runs; default {FOLDER}."),
    ] = None,
    runs: Annotated[
        list[Path] | None, typer.Option(help="A run whose training curves are drawn; repeatable.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
    png: Annotated[
        Path | None, typer.Option("--png", help="Draw the training steps as a PNG too, for a README.")
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Show the page in the browser.")] = False,
) -> None:
    """Make one HTML page of results: figures with intervals, provenance, every row. It needs no network."""
    from rich.console import Console

    from .report.page import render
    from .report.source import read_source
    from .results import ResultsError

    say = Console(stderr=True, highlight=False)
    try:
        given = list(files or [])
        if all((path / "metrics.jsonl").is_file() for path in given):
            given.append(FOLDER)
        source = read_source(given, runs or [])
        _write(out, render(source).encode(), "--out")
        if png is not None:
            from .report.picture import draw

            _write(png, draw(source), "--png")
    except ResultsError as error:
        say.print(str(error), style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    rows = sum(len(one.rows) for one in source.results)
    say.print(f"{out}: {rows} rows of {len(source.results)} files", markup=False, soft_wrap=True)
    if open_page:
        typer.launch(out.absolute().as_uri())


def _write(path: Path, content: bytes, option: str) -> None:
    """Whole or not at all.

    Raises:
        ResultsError: the place can't be written.
    """
    from .results import ResultsError

    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ResultsError(f"{option} {path}: can't be written: {error.strerror}") from None
