"""Checked JSON: what the readers of result files have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from .results import FIGURES, Better, Figure, Row
from .statistics import Runs

Positive = Annotated[FiniteFloat, Field(gt=0)]
AtLeastZero = Annotated[FiniteFloat, Field(ge=0)]
Samples = Annotated[list[Positive], Field(min_length=1)]
Model = TypeVar("Model", bound=BaseModel)


class Checked(BaseModel):
    """A part of a result file; fields that nobody needs are passed over."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)


def figure(
    name: str,
    runs: Runs,
    unit: str | None = None,
    better: Better | None = None,
    interval: tuple[float, float] | None = None,
) -> Figure:
    """With unit and direction of `FIGURES` where they are not given."""
    known_unit, known_better = FIGURES.get(name, ("", "less"))
    fixed = tuple(tuple(run) for run in runs)
    return Figure(name, known_unit if unit is None else unit, better or known_better, fixed, interval)


def each(model: type[Model], rows: Any, name: str = "rows") -> Iterator[Model]:
    """Checked rows.

    Raises:
        BadRow: the first that is not such a row.
    """
    if not isinstance(rows, list):
        raise BadRow(name, TypeError(f"a list is needed, not {type(rows).__name__}"))
    for number, row in enumerate(rows):
        try:
            yield model.model_validate(row)
        except ValueError as error:
            raise BadRow(f"{name}[{number}]", error) from error


class BadRow(ValueError):
    """The row's place and what is wrong with it."""

    def __init__(self, place: str, error: ValueError | TypeError) -> None:
        super().__init__(f"{place}: {first_problem(error)}")


def first_problem(error: ValueError | TypeError) -> str:
    """Place and complaint of what pydantic found, or what another check said."""
    problems = getattr(error, "errors", None)
    if problems is None:
        return str(error)
    first = problems(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']}" if place else str(first["msg"])


def make_row(
    benchmark: str,
    op: str,
    variant: str,
    phase: str,
    dtype: str,
    shape: Mapping[str, Any],
    status: str,
    figures: list[Figure],
    **further: Any,
) -> Row:
    """A row of the one form; of a status, what follows its first colon is the reason."""
    brief, _, reason = status.partition(": ")
    named = {one.name: one for one in figures}
    fixed = tuple((name, value) for name, value in shape.items() if value != "")
    return Row(benchmark, op, variant, phase, dtype, fixed, brief, reason, named, **further)
