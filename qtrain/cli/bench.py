"""`qtrain bench`: the parts of `qtrain.bench` that a user runs."""

from __future__ import annotations

import typer

from qtrain.bench.cards_command import cards
from qtrain.bench.compare_command import compare
from qtrain.bench.kernels_command import kernels
from qtrain.bench.quantizers_command import quantizers
from qtrain.bench.report_command import report
from qtrain.bench.train_command import train

from .bench_checkpoints import checkpoints

app = typer.Typer(no_args_is_help=True)
app.command("cards")(cards)
app.command("kernels")(kernels)
app.command("train")(train)
app.command("compare")(compare)
app.command("report")(report)
app.command("quantizers")(quantizers)
app.command("checkpoints")(checkpoints)


@app.callback()
def _group() -> None:
    """What was gained: kernels, training steps, exports and served checkpoints, measured beside the peers."""
