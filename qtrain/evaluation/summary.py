"""Figures of one or several subjects over the same rows, in the form that every output shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from .bootstrap import Interval, difference_interval, mean_interval, verdict
from .score import PairScore, RowScore

Unit = Literal["share", "nats"]


@dataclass(frozen=True, slots=True)
class Measured:
    """Everything that was measured of one subject."""

    name: str
    base: str
    weights: str
    adapter: str | None
    rows: list[RowScore]
    pairs: list[PairScore]
    tokenizer: str  # hash of the vocabulary: losses per token of different ones can't be compared
    max_new_tokens: int
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Line:
    """One subject's figure."""

    subject: str
    value: Interval
    detail: str  # a figure beside it: perplexity, how many rows
    difference: Interval | None = None  # to the first subject, over the same rows
    verdict: str | None = None


@dataclass(frozen=True, slots=True)
class Section:
    """One measure, a line for every subject."""

    title: str
    explanation: str
    unit: Unit
    higher_is_better: bool
    lines: list[Line]


@dataclass(frozen=True, slots=True)
class _Measure:
    title: str
    explanation: str
    unit: Unit
    higher_is_better: bool
    values: list[list[float]]  # [subjects][rows]
    details: list[str]
    weights: list[list[float]] | None = None  # [subjects][rows]
    comparable: bool = True


def sections(measured: Sequence[Measured]) -> list[Section]:
    """Exact checks (overall and by kind), loss, and preferences where there are pairs.

    The first subject is what the others are held against. All have the same rows in the same order.
    """
    found = [_checks(measured, None)]
    kinds = list(dict.fromkeys(row.kind for row in measured[0].rows))
    if len(kinds) > 1:
        found += [_checks(measured, kind) for kind in kinds]
    found.append(_loss(measured))
    if measured[0].pairs:
        found += [
            _preference(measured, per_token=False),
            _preference(measured, per_token=True),
            _margin(measured),
        ]
    return [_section(measured, measure) for measure in found]


def score_of(measured: Measured) -> dict[str, Any]:
    """The exact-check score alone: mean, low, high, rows, passed."""
    passed = [float(row.passed) for row in measured.rows]
    return asdict(mean_interval(passed)) | {"passed": int(sum(passed))}


def disagreements(measured: Sequence[Measured]) -> list[int]:
    """Numbers of the rows that some subjects pass and others do not."""
    return [
        number
        for number in range(len(measured[0].rows))
        if len({subject.rows[number].passed for subject in measured}) > 1
    ]


def _checks(measured: Sequence[Measured], kind: str | None) -> _Measure:
    chosen = [
        [float(row.passed) for row in subject.rows if kind is None or row.kind == kind]
        for subject in measured
    ]
    count = len(chosen[0])
    title = "exact checks" if kind is None else f"exact checks: {kind}"
    details = [f"{int(sum(values))} of {count}" for values in chosen]
    return _Measure(title, "answers that pass their check", "share", True, chosen, details)


def _loss(measured: Sequence[Measured]) -> _Measure:
    values = [[row.nll for row in subject.rows] for subject in measured]
    weights = [[float(row.nll_tokens) for row in subject.rows] for subject in measured]
    losses = [sum(nll) / sum(tokens) for nll, tokens in zip(values, weights, strict=True)]
    comparable = len({subject.tokenizer for subject in measured}) == 1 and all(
        w == weights[0] for w in weights
    )
    explanation = "negative log-likelihood of the reference answers, nats a token"
    if not comparable:
        explanation += "; the subjects see other tokens, so that the figures can't be held against each other"
    details = [f"perplexity {math.exp(min(loss, 700.0)):.3f}" for loss in losses]
    return _Measure("loss", explanation, "nats", False, values, details, weights, comparable)


def _preference(measured: Sequence[Measured], *, per_token: bool) -> _Measure:
    chosen = [
        [float(pair.right_per_token if per_token else pair.right) for pair in subject.pairs]
        for subject in measured
    ]
    title = "preference accuracy, per token" if per_token else "preference accuracy"
    what = "divided by their tokens" if per_token else "summed over their tokens"
    details = [f"{int(sum(values))} of {len(values)}" for values in chosen]
    explanation = f"pairs whose chosen answer is likelier than the rejected one, log-probs {what}"
    return _Measure(title, explanation, "share", True, chosen, details)


def _margin(measured: Sequence[Measured]) -> _Measure:
    values = [[pair.margin for pair in subject.pairs] for subject in measured]
    explanation = "log-prob of the chosen answer minus that of the rejected one, nats"
    return _Measure("preference margin", explanation, "nats", True, values, [""] * len(measured))


def _section(measured: Sequence[Measured], measure: _Measure) -> Section:
    first = measure.values[0]
    weights: Sequence[list[float] | None] = measure.weights or [None] * len(measured)
    lines = []
    for number, (subject, values, detail) in enumerate(
        zip(measured, measure.values, measure.details, strict=True)
    ):
        difference = None
        if number and measure.comparable:
            difference = difference_interval(first, values, weights[0])
        word = None if difference is None else verdict(difference, higher_is_better=measure.higher_is_better)
        value = mean_interval(values, weights[number])
        lines.append(Line(subject.name, value, detail, difference, word))
    return Section(measure.title, measure.explanation, measure.unit, measure.higher_is_better, lines)
