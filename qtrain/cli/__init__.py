"""The command line. Modules here import torch and its company only inside the commands that need them."""

from __future__ import annotations

import logging
import os
import sys
import warnings

import typer

from qtrain.errors import QtrainError
from qtrain.export.errors import ExportError, GateFailed

from . import bench, chat, compare, data, env, evaluate, export, run, runs
from .terminal import print_error

app = typer.Typer(
    name="qtrain",
    help="Fine-tune a 4-bit LLM on one card: data, SFT, DPO, measured. Start with: qtrain run --4bit",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
)
app.command("run")(run.run)
app.command("eval")(evaluate.evaluate)
app.command("compare")(compare.compare)
app.command("runs")(runs.runs)
app.command("chat")(chat.chat)
app.command("env")(env.env)
app.add_typer(data.app, name="data")
app.add_typer(bench.app, name="bench")
app.add_typer(export.app, name="export")


@app.callback(invoke_without_command=True)
def _root(
    version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True),
) -> None:
    if version:
        from qtrain import __version__

        typer.echo(f"qtrain {__version__}")
        raise typer.Exit


def export_main() -> None:
    """The console script `export`: `qtrain export` under a name that shells keep for a builtin of theirs."""
    main(["export", *sys.argv[1:]])


def main(words: list[str] | None = None) -> None:
    """Run the command line; a user's mistake is one line on stderr, never a traceback."""
    # Before torch is imported. OpenMP's threads spin for milliseconds while they wait: with any other process
    # on the same cores, a step takes five to thirty times as long (docs/lab-log.md).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    # bitsandbytes logs, when imported, that it found no hub kernels for CPUs; qtrain uses none
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # peft still asks transformers by a name that is to go
    warnings.filterwarnings(
        "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
    )
    try:
        app(words)
    except (QtrainError, ExportError, GateFailed) as error:
        print_error(error)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()  # `qtrain runs | head`
        sys.exit(141)
