"""The long form, that benchmarks without a reader of their own write: `results` describes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat

from .result_checks import AtLeastZero, Checked, each, figure, make_row
from .results import FIELDS, OK, Better, Figure, Row
from .statistics import Runs


def _number_or_figure(value: Any) -> Any:
    return {"value": value} if isinstance(value, int | float) else value


class LongFigure(Checked):
    """Samples, samples by process, or one value."""

    value: FiniteFloat | None = None
    samples: Annotated[list[FiniteFloat], Field(min_length=1)] | None = None
    runs: Annotated[list[Annotated[list[FiniteFloat], Field(min_length=1)]], Field(min_length=1)] | None = (
        None
    )
    interval: tuple[FiniteFloat, FiniteFloat] | None = None
    unit: str | None = None
    better: Better | None = None


class LongRow(BaseModel):
    """A row of the long form; `results` describes it. Further fields are kept."""

    model_config = ConfigDict(extra="allow", populate_by_name=True)
    op: str = ""
    variant: str
    phase: str = Field(default="", alias="pass")
    dtype: str = ""
    shape: dict[str, str | int | float | bool | None] = Field(default_factory=dict)
    status: str = OK
    figures: dict[str, Annotated[LongFigure, BeforeValidator(_number_or_figure)]] | None = None
    noise_floor: AtLeastZero | None = None
    flops: AtLeastZero | None = None
    ideal_bytes: AtLeastZero | None = None


def long_rows(report: Mapping[str, Any]) -> Iterator[Row]:
    """Of a benchmark that writes the long form."""
    for row in each(LongRow, [_with_names(one) for one in report["rows"]]):
        further = row.model_extra or {}
        shape = dict(row.shape)
        if row.figures is None:
            found = _plain_figures(further)
            taken = {"reason", *FIELDS, "n"}
            shape |= {k: v for k, v in further.items() if k not in taken and isinstance(v, str | int)}
        else:
            found = [_long_figure(name, given) for name, given in row.figures.items()]
        figures = found if row.status == OK else []
        yield make_row(
            str(report["kind"]), row.op, row.variant, row.phase, row.dtype, shape, row.status, figures,
            noise_floor=row.noise_floor, flops=row.flops, ideal_bytes=row.ideal_bytes, details=further,
        )  # fmt: skip


_OTHER_NAMES = {"variant": ("name", "tool", "quantizer", "checkpoint"), "op": ("task", "method")}


def _with_names(row: Any) -> Any:
    """Other words for op and variant."""
    if not isinstance(row, dict):
        return row
    known = dict(row)
    for name, others in _OTHER_NAMES.items():
        for other in others:
            if name not in known and isinstance(known.get(other), str):
                known[name] = known.pop(other)
    return known


def _plain_figures(fields: Mapping[str, Any]) -> list[Figure]:
    return [
        figure(FIELDS[name][0], [[float(value) * FIELDS[name][1]]])
        for name, value in fields.items()
        if name in FIELDS and isinstance(value, int | float)
    ]


def _long_figure(name: str, given: LongFigure) -> Figure:
    runs: Runs | None = given.runs or ([given.samples] if given.samples else None)
    if runs is None:
        if given.value is None:
            raise ValueError(f"figure {name!r} has no value, samples or runs")
        runs = [[given.value]]
    return figure(name, runs, given.unit, given.better, given.interval)
