"""`qtrain export`: checkpoints that other programs load."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from . import export_quantize
from .terminal import console

app = typer.Typer(no_args_is_help=True)


class Base(str, Enum):
    """The weights that the adapter is added to."""

    auto = "auto"
    original = "original"
    dequantized = "dequantized"


class Dtype(str, Enum):
    """Of the merged weights."""

    stored = "stored"
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


@app.callback()
def _group() -> None:
    """Write a run or a model as a checkpoint that transformers and vLLM load, measured."""


@app.command("merge")
def merge(
    source: Annotated[
        str,
        typer.Argument(metavar="RUN|MODEL", help="A finished run, or a model: folder, hub name, demo."),
    ],
    base: Annotated[
        Base,
        typer.Option(
            help="The 16-bit weights, or the dequantised NF4 that a 4-bit run was trained on; "
            "auto: as it was trained."
        ),
    ] = Base.auto,
    dtype: Annotated[Dtype, typer.Option(help="stored: each tensor keeps its own.")] = Dtype.stored,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write (default: RUN/export/merged).", show_default=False)
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Weights in one file, at most.")] = "4GB",
    adapter: Annotated[
        Path | None, typer.Option(help="A PEFT adapter to merge into a plain MODEL.", show_default=False)
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Rows to measure on (default: the run's held-out rows).")
    ] = None,
    rows: Annotated[int, typer.Option(min=0, help="Rows to measure on; 0 measures nothing.")] = 8,
    tokens: Annotated[int, typer.Option(min=2, help="Cut those rows there.")] = 512,
    force: Annotated[bool, typer.Option("--force", help="Replace the folder if it exists.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what would be written, sizes, memory and time; write nothing."),
    ] = False,
) -> None:
    """Write base and adapter as one checkpoint, and measure what merging changed.

    Memory holds one file of the base at a time. Files in which nothing changes, tokenizer and template are
    copied byte for byte.
    """
    from qtrain.export_command.merge import MergeOptions, export_merge

    options = MergeOptions(
        base=base.value,
        dtype=dtype.value,
        out=out,
        max_shard_size=max_shard_size,
        adapter=adapter,
        data=data or [],
        rows=rows,
        tokens=tokens,
        force=force,
        dry_run=dry_run,
    )
    export_merge(source, options, console())


app.command("gptq")(export_quantize.gptq)
app.command("awq")(export_quantize.awq)
app.command("verify")(export_quantize.verify)
