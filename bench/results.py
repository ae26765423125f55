"""One form for the rows of every benchmark: what `compare` and `report` work with.

A result file is a JSON object. `bench kernels`, `bench train`, `bench quantizers` and `bench cards` write
files with rows of their own, which `result_readers` translates; every other benchmark writes the long form
itself:

    {"kind": "quantizers",                        any name; files of one kind can be compared
     "provenance": {...},                         of `provenance.provenance()`
     "protocol": {"threads": 2, ...},             what has to be equal for a comparison goes under "setting"
     "rows": [{"op": "gptq",                      what is done
               "variant": "qtrain",               who does it; "NAME (again)" is NAME's A/A run
               "pass": "",                        forward, backward, prefill ...; may be left out
               "dtype": "int4 sym",
               "shape": {"group_size": 64},       whatever else tells the row from others; may be left out
               "status": "ok",                    or why there are no figures: "out of memory: needs 20 GiB"
               "figures": {"time": {"samples": [12.1, 11.9, 12.0], "unit": "s", "better": "less"},
                           "KL": {"value": 0.141, "interval": [0.137, 0.146]},
                           "size": 91_000_000}}]}

A figure has "samples" (numbers), "runs" (a list of samples for each process) or one "value"; a number alone
is a value. "unit" and "better" may be left out for the names in `FIGURES`. Rows without "figures" may have
such figures as plain fields ("kl", "perplexity", "size_bytes", "wall_s", "peak_bytes" ...: `FIELDS`): then
words and integers beside them are their shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from .statistics import median, percentile

Better = Literal["less", "more"]
Key = tuple[str, str, str, str, str]

OK = "ok"
TIME, MEMORY = "time", "memory"
OURS = "qtrain"  # what the names of our own variants begin with
AGAIN = " (again)"
BROKEN = ("wrong", "failed", "out of memory")  # what a status begins with where a variant was tried in vain

# name -> (unit, better)
FIGURES: dict[str, tuple[str, Better]] = {
    TIME: ("s", "less"),
    "CPU time": ("s", "less"),
    "wall time": ("s", "less"),
    MEMORY: ("bytes", "less"),
    "memory loaded": ("bytes", "less"),
    "size": ("bytes", "less"),
    "KL": ("nats", "less"),
    "perplexity": ("", "less"),
    "perplexity increase": ("", "less"),
    "bits per weight": ("bits", "less"),
    "top-1 agreement": ("share", "more"),
    "task score": ("share", "more"),
    "prefill": ("tokens/s", "more"),
    "decode": ("tokens/s", "more"),
    "throughput": ("tokens/s", "more"),
    "TTFT": ("s", "less"),
    "TPOT": ("s", "less"),
}

# a plain field of a row -> (figure's name, bytes or seconds in one of its units)
FIELDS: dict[str, tuple[str, float]] = {
    "time_s": (TIME, 1),
    "seconds": (TIME, 1),
    "cpu_s": ("CPU time", 1),
    "wall_s": ("wall time", 1),
    "peak_bytes": (MEMORY, 1),
    "peak_mib": (MEMORY, 1 << 20),
    "loaded_bytes": ("memory loaded", 1),
    "size_bytes": ("size", 1),
    "size_mib": ("size", 1 << 20),
    "kl": ("KL", 1),
    "kl_mean": ("KL", 1),
    "mean_kl": ("KL", 1),
    "perplexity": ("perplexity", 1),
    "ppl": ("perplexity", 1),
    "perplexity_increase": ("perplexity increase", 1),
    "bits_per_weight": ("bits per weight", 1),
    "top1_agreement": ("top-1 agreement", 1),
    "top1": ("top-1 agreement", 1),
    "task_score": ("task score", 1),
    "prefill_tokens_per_s": ("prefill", 1),
    "decode_tokens_per_s": ("decode", 1),
    "tokens_per_s": ("throughput", 1),
    "ttft_s": ("TTFT", 1),
    "tpot_s": ("TPOT", 1),
}


class ResultsError(ValueError):
    """A file that is no result, or results that can't be held against each other: one line."""


@dataclass(frozen=True)
class Figure:
    """One measured quantity of a row; `runs` are its samples by process, none empty."""

    name: str
    unit: str
    better: Better
    runs: tuple[tuple[float, ...], ...]
    interval: tuple[float, float] | None = None
    """95 %, where the benchmark itself gave one; not of the samples."""

    @cached_property
    def n(self) -> int:
        """Samples."""
        return sum(len(run) for run in self.runs)

    @cached_property
    def p05(self) -> float:
        """Of all samples."""
        return percentile(self.runs, 5)

    @cached_property
    def p50(self) -> float:
        """Their median."""
        return median(self.runs)

    @cached_property
    def p95(self) -> float:
        """Of all samples."""
        return percentile(self.runs, 95)


@dataclass(frozen=True)
class Row:
    """One variant of one op at one shape."""

    benchmark: str
    op: str
    variant: str
    phase: str  # the pass: forward, backward, step ...
    dtype: str
    shape: tuple[tuple[str, Any], ...]
    status: str = OK
    reason: str = ""  # of a status that is not ok
    figures: Mapping[str, Figure] = field(default_factory=dict)
    noise_floor: float | None = None
    """Of its time, as the file says; `compare.floor` finds it in the A/A rows."""
    flops: float | None = None
    ideal_bytes: float | None = None
    roofline_share: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    """What no other row has a field for."""

    @property
    def key(self) -> Key:
        """What a row of another file has in common with this one, if it is the same case."""
        return (self.op, self.variant, self.phase, self.dtype, self.shape_text)

    @property
    def key_of_first(self) -> Key:
        """Of an A/A run: the key of the variant that it repeats."""
        return (self.op, self.variant.removesuffix(AGAIN), self.phase, self.dtype, self.shape_text)

    @property
    def case(self) -> Key:
        """The key without the variant."""
        return (self.op, "", self.phase, self.dtype, self.shape_text)

    @cached_property
    def shape_text(self) -> str:
        """`M 512, K 896`; words go without their names."""
        parts = [str(value) if isinstance(value, str) else f"{name} {value}" for name, value in self.shape]
        return ", ".join(part for part in parts if part)

    @property
    def where(self) -> str:
        """The case in words."""
        return " ".join(part for part in (self.op, self.shape_text, self.dtype, self.phase) if part)


@dataclass(frozen=True)
class Results:
    """One file."""

    path: Path
    kind: str
    rows: tuple[Row, ...]
    setting: Mapping[str, str]
    """What must be equal in two files whose figures are compared: device, threads, clock, model."""
    provenance: Mapping[str, Any]
    protocol: Mapping[str, Any]

    @property
    def commit(self) -> str:
        """Of the source, in short; `+` after it: with uncommitted changes."""
        source = self.provenance.get("source") or {}
        commit = source.get("commit")
        return f"{str(commit)[:7]}{'+' if source.get('dirty') else ''}" if commit else "unknown"

    @property
    def versions(self) -> Mapping[str, Any]:
        """Of packages."""
        return self.provenance.get("versions") or {}
