"""`python -m qtrain.bench`: the reports, each also a module of its own."""

from __future__ import annotations

import typer

from .cards_command import cards
from .kernels_command import kernels
from .layer_model import layer
from .quantizers_command import quantizers
from .train_command import train

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command("cards")(cards)
app.command("kernels")(kernels)
app.command("layer")(layer)
app.command("quantizers")(quantizers)
app.command("train")(train)


@app.callback()
def _group() -> None:
    """Timed comparisons with the peers, and what compiled kernels cost."""


app(prog_name="python -m qtrain.bench")
