"""The command `cards`: of `qtrain bench`, of `python -m qtrain.bench`, and `python -m qtrain.bench.cards`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from qtrain.kernels.specimens import Specimen

    from .cards import Card

EMULATED_ARCH = 89


def cards(
    arch: Annotated[
        list[int] | None, typer.Option(help="Compute capability, as 89; repeatable; default all.")
    ] = None,
    only: Annotated[str, typer.Option(help="Only kernels whose name contains this.")] = "",
    emulate: Annotated[
        bool, typer.Option("--emulate", help="Run the code for sm_89 too: bytes, bank conflicts, roofline.")
    ] = False,
    json: Annotated[Path | None, typer.Option("--json", help="Write the cards as JSON too.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table as Markdown too.")] = None,
) -> None:
    """What the compiled code of every Triton kernel holds: registers, spills, access widths, main loop.

    Compiled here for the named GPUs, of which none is needed. Exit code 1: a kernel is over its budget.
    """
    from rich.console import Console

    from .aot import NoTriton, require_triton
    from .architectures import ARCHITECTURES
    from .budget import violations

    say = Console(stderr=True)
    unknown = [one for one in arch or [] if one not in ARCHITECTURES]
    if unknown:
        say.print(f"--arch {unknown[0]}: there is {', '.join(map(str, ARCHITECTURES))}", style="red")
        raise typer.Exit(2)
    if emulate and EMULATED_ARCH not in (arch or ARCHITECTURES):
        say.print(f"--emulate runs the code for sm_{EMULATED_ARCH}: add --arch {EMULATED_ARCH}", style="red")
        raise typer.Exit(2)
    try:
        require_triton()
    except NoTriton as error:
        say.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from None
    made, failures = _make(_chosen(only, say), arch or list(ARCHITECTURES), emulate, say)
    _show(made, markdown)
    for failure in failures:
        say.print(failure, style="red", markup=False, highlight=False)
    if json is not None:
        _write_json(made, failures, json)
    raise typer.Exit(int(bool(failures) or any(violations(card) for card in made)))


def _chosen(only: str, say: Console) -> list[Specimen]:
    from qtrain.kernels.specimens import all_specimens

    specimens = all_specimens()
    chosen = [specimen for specimen in specimens if only in specimen.name]
    if not chosen:
        names = "\n".join(specimen.name for specimen in specimens)
        say.print(f"--only {only!r} fits none of\n{names}", style="red", markup=False)
        raise typer.Exit(2)
    return chosen


def _make(
    specimens: Sequence[Specimen], archs: Sequence[int], emulated: bool, say: Console
) -> tuple[list[Card], list[str]]:
    """A card for each specimen on each architecture, and why some can't be had; `say` shows the progress."""
    import os
    from dataclasses import replace

    from .aot import NotCompiled
    from .cards import make_card, prepare_cards

    made, failures = [], []
    with say.status("compiling") as status:
        for arch in archs:
            prepare_cards(specimens, arch, threads=min(4, os.cpu_count() or 1), progress=status.update)
        for specimen in specimens:
            for arch in archs:
                try:
                    card = make_card(specimen, arch)
                except (NotCompiled, ValueError) as error:
                    failures.append(str(error))
                    continue
                if emulated:
                    from .cards_emulated import emulate

                    status.update(f"emulating {specimen.name}")
                    card = replace(card, emulated=emulate(specimen) if arch == EMULATED_ARCH else None)
                made.append(card)
    return made, failures


def _show(made: Sequence[Card], markdown: Path | None) -> None:
    import sys
    from itertools import groupby

    from rich.console import Console

    from .cards_table import COLUMNS, EMULATED_COLUMNS, cells, emulated_cells, excesses, line
    from .table import markdown_table, terminal_table

    screen = Console(width=None if sys.stdout.isatty() else 260, highlight=False)
    rows = [cells(card) for card in made]
    title = "Compiled code; nothing was timed"
    if screen.width >= 180:
        screen.print(terminal_table(title, COLUMNS, rows))
    else:
        screen.print(title, style="italic")
        for name, of_one in groupby(made, key=lambda card: card.specimen):
            screen.print(name, style="bold", markup=False)
            for card in of_one:
                screen.print(f"  {line(card)}", markup=False)
    emulated = [emulated_cells(card.specimen, card.emulated) for card in made if card.emulated]
    if emulated:
        heading = "Executed by the emulator; times are modelled for an RTX 4090"
        screen.print(terminal_table(heading, EMULATED_COLUMNS, emulated))
    for card in made:
        for excess in excesses(card):
            screen.print(excess, style="red", markup=False)
    if markdown is not None:
        tables = [markdown_table(COLUMNS, rows)]
        tables += [markdown_table(EMULATED_COLUMNS, emulated)] if emulated else []
        markdown.write_text("\n".join(tables))


def _write_json(made: Sequence[Card], failures: Sequence[str], path: Path) -> None:
    import json

    from .budget import violations
    from .provenance import provenance

    report = {
        "kind": "cards",
        "timed": False,
        "provenance": provenance(),
        "cards": [card.as_dict() | {"over_budget": violations(card)} for card in made],
        "failures": list(failures),
    }
    path.write_text(json.dumps(report, indent=1) + "\n")
