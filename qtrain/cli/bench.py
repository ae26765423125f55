"""`qtrain bench`: the parts of `qtrain.bench` that a user runs."""

from __future__ import annotations

import typer

from qtrain.bench.cards_command import cards
from qtrain.bench.kernels_command import kernels

app = typer.Typer(no_args_is_help=True)
app.command("cards")(cards)
app.command("kernels")(kernels)


@app.callback()
def _group() -> None:
    """What the kernels cost: cards of the compiled code, timings beside the peers."""
