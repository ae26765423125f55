"""What `qtrain export gptq` and `qtrain export awq` can be told, checked and put into the export's terms."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from qtrain.export.containers import HEAD, Container, check_scheme
from qtrain.export.errors import ExportError
from qtrain.export.formats.scheme import GROUP_SIZES, Scheme
from qtrain.export.module_schemes import Change, parse_change
from qtrain.export.quantize_stage import StageSettings
from qtrain.export.verify import Bounds, parse_gate

from .calibrate import RowsSettings
from .merge import BaseChoice

Algorithm = Literal["gptq", "awq"]
# GPTQ v1 stores z - 1, and its readers disagree on a stored -1
LOWEST_ZERO: dict[Container, int] = {"gptq": 1, "awq": 0, "compressed-tensors": 0}
CHOICES: dict[str, tuple[str, ...]] = {
    "act-order": ("static", "off", "full"),
    "rounding": ("gptq", "nearest"),
    "scaling": ("none", "awq"),
    "base": get_args(BaseChoice),
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("auto", "fp32", "bf16", "fp16"),
}
CONTAINERS: dict[Algorithm, tuple[Container, ...]] = {
    "gptq": ("gptq", "compressed-tensors"),
    "awq": ("awq", "compressed-tensors"),
}


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """What the command line says."""

    algorithm: Algorithm
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    container: str = "gptq"
    rounding: str = "gptq"
    act_order: str = "static"
    scaling: str = "awq"
    clip: bool = False
    correction: float = 0.5
    damp: float = 0.01
    refine: int = 1
    lm_head: bool = False
    changes: list[str] = field(default_factory=list)
    calib: int = 128
    calib_length: int = 512
    calib_data: list[str] = field(default_factory=list)
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    base: BaseChoice = "auto"
    adapter: Path | None = None
    out: Path | None = None
    max_shard_size: str = "4GB"
    resume: bool = False
    force: bool = False
    dry_run: bool = False
    gate: str | None = None
    data: list[str] = field(default_factory=list)
    rows: int = 8
    tokens: int = 512


@dataclass(frozen=True, slots=True)
class Settings:
    """The options, checked, in the export's terms."""

    container: Container
    scheme: Scheme
    stage: StageSettings
    changes: list[Change]
    lm_head: bool
    rows: RowsSettings
    bounds: Bounds | None


def check_options(options: QuantizeOptions) -> Settings:
    """Everything that can be said of the options alone.

    Raises:
        ExportError: names the option, the value and what it may be.
    """
    for name, allowed in CHOICES.items():
        one_of(name, str(getattr(options, name.replace("-", "_"))), allowed)
    one_of("format", options.container, CONTAINERS[options.algorithm])
    container: Container = options.container  # type: ignore[assignment]  # it is one of them
    one_of("bits", options.bits, (2, 4, 8))
    one_of("group-size", options.group_size, (*reversed(GROUP_SIZES), -1))
    _within("damp", options.damp, 0.0, 1.0)
    _within("correction", options.correction, 0.0, 1.0)
    _within("calib", options.calib, 1)
    _within("calib-length", options.calib_length, 8)
    _within("refine", options.refine, 0)
    _within("rows", options.rows, 0)
    _within("tokens", options.tokens, 2)
    changes = [parse_change(text) for text in options.changes]
    nearest = options.rounding == "nearest"
    if options.act_order == "full" and (nearest or container != "gptq"):
        what = "--rounding nearest rounds in no order" if nearest else f"--format {container} has no g_idx"
        raise ExportError(f"--act-order full: {what}; use --act-order static")
    scheme = Scheme(options.bits, options.group_size, options.symmetric, options.act_order == "full")
    check_scheme(container, scheme)
    lm_head = options.lm_head or any(change.part == HEAD for change in changes)
    stage: dict[str, Any] = {
        "rounding": options.rounding,
        "act_order": options.act_order,
        "scaling": options.scaling,
        "clip": options.clip and nearest,
        "correction": 0.0 if nearest else options.correction,
        "damp": options.damp,
        "refine": options.refine,
        "lowest_zero": LOWEST_ZERO[container],
        "keep_last_states": lm_head,
    }
    rows = RowsSettings(
        options.calib,
        options.calib_length,
        options.calib_data,
        options.seed,
        options.data,
        options.rows,
        options.tokens,
    )
    bounds = parse_gate(options.gate)
    if bounds is not None and not options.rows:
        raise ExportError("--rows 0 leaves nothing to measure; give --gate off with it")
    return Settings(container, scheme, StageSettings(**stage), changes, lm_head, rows, bounds)


def one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    """Refuse a value that an option can't have.

    Raises:
        ExportError: says what it may be, and the nearest.
    """
    if value in allowed:
        return
    words = [str(word) for word in allowed]
    close = difflib.get_close_matches(str(value), words, n=1) if isinstance(value, str) else []
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ExportError(f"--{name} is {value}, must be one of {', '.join(words)}{hint}")


def _within(name: str, value: float, least: float, most: float | None = None) -> None:
    if not (value >= least and (most is None or value <= most)):
        limits = f"{least:g} or more" if most is None else f"{least:g} .. {most:g}"
        raise ExportError(f"--{name} is {value:g}, must be {limits}")
