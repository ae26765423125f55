"""`qtrain export gptq`, `qtrain export awq`: checkpoints of a few bits a weight."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qtrain.export.errors import ExportError

from .terminal import console


def _number(name: str, kind: type[int] | type[float] = int) -> Any:
    """A parser whose error is a line, not a page of usage."""

    def parse(value: Any) -> Any:
        try:
            return kind(value)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise ExportError(f"--{name} is '{value}', must be {what}") from None

    return parse


Source = Annotated[
    str, typer.Argument(metavar="RUN|MODEL", help="A finished run, or a model: folder, hub name, demo.")
]
Bits = Annotated[int, typer.Option(parser=_number("bits"), metavar="N", help="Of a weight: 2, 4 or 8.")]
GroupSize = Annotated[
    int,
    typer.Option(
        parser=_number("group-size"),
        metavar="N",
        help="Columns that share a scale: 32, 64, 128; -1 for the whole row.",
    ),
]
ActOrder = Annotated[
    str,
    typer.Option(
        help="Columns by activation: static keeps groups as they stand; full regroups, which vLLM refuses."
    ),
]
Rounding = Annotated[str, typer.Option(help="gptq: with error feedback; nearest: to the nearest.")]
Scaling = Annotated[
    str,
    typer.Option(help="awq: channel scales searched and folded into the norm or linear layer before; none."),
]
Clip = Annotated[
    bool, typer.Option("--clip/--no-clip", help="Search how far ranges are clipped (nearest only).")
]
Calib = Annotated[int, typer.Option(parser=_number("calib"), metavar="N", help="Calibration windows.")]
CalibLength = Annotated[
    int, typer.Option(parser=_number("calib-length"), metavar="N", help="Tokens of a window.")
]
CalibData = Annotated[
    list[str] | None,
    typer.Option(
        help="Rows to calibrate on: a data file or a .txt; again for more (default: the run's training rows)."
    ),
]
Change = Annotated[
    list[str] | None,
    typer.Option("--set", help="modules.down_proj.bits=8: single modules; bits=16 leaves them alone."),
]
LmHead = Annotated[bool, typer.Option("--lm-head", help="Quantise the output head too.")]
Damp = Annotated[
    float,
    typer.Option(
        parser=_number("damp", float),
        metavar="X",
        help="Damping, relative to the mean of the Gram matrix's diagonal.",
    ),
]
Refine = Annotated[
    int,
    typer.Option(
        parser=_number("refine"), metavar="N", help="Rounds of refining scales and integers after rounding."
    ),
]
Correction = Annotated[
    float,
    typer.Option(
        parser=_number("correction", float),
        metavar="X",
        help="0 .. 1: how much of what earlier layers lost is made up for (GPTAQ).",
    ),
]
Seed = Annotated[
    int, typer.Option(parser=_number("seed"), metavar="N", help="Of the calibration rows' order.")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="Of the calibration's forward: fp32, bf16, fp16; auto: bf16 where the device multiplies in it."
    ),
]
Base = Annotated[
    str,
    typer.Option(
        help="original, or dequantized: the NF4 that a 4-bit run was trained on; auto: as it was trained."
    ),
]
Adapter = Annotated[
    Path | None, typer.Option(help="A PEFT adapter to merge into a plain MODEL.", show_default=False)
]
Out = Annotated[
    Path | None, typer.Option(help="Folder to write (default: in RUN/export).", show_default=False)
]
ShardSize = Annotated[str, typer.Option(help="Weights in one file, at most.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an export that was stopped.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the folder, begin anew.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be written, sizes, memory and time; write nothing.")
]
Gate = Annotated[
    str | None,
    typer.Option(
        help="Bounds, e.g. kl=0.1,ppl=1.05,top1=0.8; off.", show_default="kl=0.25,ppl=1.25,stops=0.9"
    ),
]
Data = Annotated[
    list[str] | None,
    typer.Option(help="Rows for the gate (default: the run's held-out rows, else some kept back)."),
]
Rows = Annotated[int, typer.Option(parser=_number("rows"), metavar="N", help="Rows for the gate.")]
Tokens = Annotated[int, typer.Option(parser=_number("tokens"), metavar="N", help="Cut those rows there.")]


def gptq(
    source: Source,
    bits: Bits = 4,
    group_size: GroupSize = 128,
    act_order: ActOrder = "static",
    sym: Annotated[bool, typer.Option("--sym/--asym", help="Without or with zero points.")] = True,
    format: Annotated[str, typer.Option(help="gptq or compressed-tensors.")] = "gptq",
    rounding: Rounding = "gptq",
    scaling: Scaling = "awq",
    clip: Clip = False,
    calib: Calib = 128,
    calib_length: CalibLength = 512,
    calib_data: CalibData = None,
    changes: Change = None,
    lm_head: LmHead = False,
    damp: Damp = 0.01,
    refine: Refine = 1,
    correction: Correction = 0.5,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    base: Base = "auto",
    adapter: Adapter = None,
    out: Out = None,
    max_shard_size: ShardSize = "4GB",
    resume: Resume = False,
    force: Force = False,
    dry_run: DryRun = False,
    gate: Gate = None,
    data: Data = None,
    rows: Rows = 8,
    tokens: Tokens = 512,
) -> None:
    """Quantise with error feedback, one decoder layer at a time, and measure what it cost.

    Writes GPTQ's format (or compressed-tensors). Below the gate the folder is kept as NAME.rejected and the
    exit code is 1. Stopped, it goes on with --resume from the last finished layer.
    """
    _export("gptq", source, symmetric=sym, **_but(locals(), "source", "sym"))


def awq(
    source: Source,
    bits: Bits = 4,
    group_size: GroupSize = 128,
    zero_point: Annotated[bool, typer.Option("--zero-point/--no-zero-point", help="With or without.")] = True,
    format: Annotated[str, typer.Option(help="awq or compressed-tensors.")] = "awq",
    rounding: Rounding = "gptq",
    scaling: Scaling = "awq",
    clip: Clip = True,
    act_order: ActOrder = "static",
    calib: Calib = 128,
    calib_length: CalibLength = 512,
    calib_data: CalibData = None,
    changes: Change = None,
    lm_head: LmHead = False,
    damp: Damp = 0.01,
    refine: Refine = 1,
    correction: Correction = 0.5,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    base: Base = "auto",
    adapter: Adapter = None,
    out: Out = None,
    max_shard_size: ShardSize = "4GB",
    resume: Resume = False,
    force: Force = False,
    dry_run: DryRun = False,
    gate: Gate = None,
    data: Data = None,
    rows: Rows = 8,
    tokens: Tokens = 512,
) -> None:
    """Search channel scales by the activations, fold them in, quantise; measure what it cost.

    Writes AWQ's GEMM format (or compressed-tensors). Below the gate the folder is kept as NAME.rejected and
    the exit code is 1. Stopped, it goes on with --resume from the last finished layer.
    """
    _export("awq", source, symmetric=not zero_point, **_but(locals(), "source", "zero_point"))


def verify(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A quantised model folder, whoever wrote it.")
    ],
    reference: Annotated[
        str | None,
        typer.Option(help="The 16-bit run or model (default: what the manifest says).", show_default=False),
    ] = None,
    gate: Gate = None,
    data: Data = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Rows to measure on.", show_default="8")] = None,
    tokens: Annotated[
        int | None, typer.Option(min=2, help="Cut those rows there.", show_default="512")
    ] = None,
    device: Device = "auto",
    reader: Annotated[
        list[str] | None,
        typer.Option(help="Let vllm, gptqmodel or transformers read it too, each in its own environment."),
    ] = None,
) -> None:
    """Read a quantised folder back from its files and compare it with the model that it was made of.

    GPTQ (v1, v2), AWQ GEMM and compressed-tensors pack-quantized. Damaged: exit code 2; below the gate: 1.
    """
    from qtrain.export_command.verify import VerifyOptions, export_verify

    options = VerifyOptions(reference, gate, data or [], rows, tokens, device, reader or [])
    export_verify(folder, options, console())


def _but(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _export(algorithm: Any, source: str, **given: Any) -> None:
    from qtrain.export_command.quantize import export_quantized
    from qtrain.export_command.quantize_options import QuantizeOptions

    given["container"] = given.pop("format")
    for name in ("changes", "calib_data", "data"):
        given[name] = given[name] or []
    export_quantized(source, QuantizeOptions(algorithm, **given), console())
