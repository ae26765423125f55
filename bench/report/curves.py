"""Training curves of runs, one panel for each quantity that they logged."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from .axes import Axis, around, from_zero
from .plots import Series, plot
from .source import Run, Source
from .text import digits

# logged name -> (what the panel says, whether the axis starts at 0)
QUANTITIES = {
    "loss": ("loss, nats", False),
    "eval_loss": ("loss on held-out rows, nats", False),
    "rewards/accuracies": ("share of pairs in which the chosen answer has the higher reward", True),
    "rewards/margins": ("reward of the chosen answer minus the rejected one's", False),
    "grad_norm": ("gradient norm", True),
    "learning_rate": ("learning rate", True),
    "tokens_per_second": ("tokens a second", True),
    "peak_memory_mib": ("peak memory, MiB", True),
}
WINDOW = 0.05  # of the steps, for the running mean
POINTS = 300  # lines with more steps are thinned


@dataclass(frozen=True, slots=True)
class Panel:
    """One quantity over all runs that log it."""

    title: str
    picture: Markup


@dataclass(frozen=True, slots=True)
class Method:
    """SFT and DPO losses are different quantities: panels of one method."""

    title: str
    says: str
    panels: list[Panel]


def methods(source: Source) -> Iterator[Method]:
    """Runs by method."""
    for name in ("sft", "dpo"):
        runs = [run for run in source.runs if run.method == name]
        if runs:
            panels = [one for quantity in QUANTITIES if (one := _panel(quantity, runs)) is not None]
            yield Method(name.upper(), _says(runs), panels)


def _says(runs: Sequence[Run]) -> str:
    told = []
    for run in runs:
        loss = [float(step["loss"]) for step in run.steps if _is_number(step.get("loss"))]
        if loss:
            tail = loss[-max(1, len(loss) // 10) :]
            end = digits(sum(tail) / len(tail))
            told.append(
                f"{run.name}: loss {digits(loss[0])} at first, {end} over the last tenth of {len(loss)} steps"
            )
    return "; ".join(told) + ". Thin: every logged step. Thick: the mean of the steps around."


def _is_number(value: Any) -> bool:
    """Logged, and not a NaN of a run that broke."""
    return isinstance(value, float | int) and math.isfinite(value)


def _panel(quantity: str, runs: Sequence[Run]) -> Panel | None:
    found = []
    for number, run in enumerate(runs):
        pairs = [(s["step"], float(s[quantity])) for s in run.steps if _is_number(s.get(quantity))]
        if len(pairs) > 1:
            found.append((run.name, number == len(runs) - 1, pairs))
    if not found:
        return None
    title, zero = QUANTITIES[quantity]
    values = [value for _, _, pairs in found for _, value in pairs]
    series: list[Series] = []
    for name, latest, pairs in found:
        steps, raw = zip(*_thinned(pairs), strict=True)
        series.append(Series("", steps, raw, ours=latest, faint=True))
        smooth = _smoothed([value for _, value in pairs])
        steps, mean = zip(*_thinned(list(zip((s for s, _ in pairs), smooth, strict=True))), strict=True)
        series.append(Series(name, steps, mean, ours=latest))
    last = [float(step) for _, _, pairs in found for step, _ in pairs]
    picture = plot(
        series, Axis(0.0, max(last)), from_zero(values) if zero else around(values),
        x_name="step", y_name=title, height=200, label_room=90,
    )  # fmt: skip
    return Panel(title, picture)


def _thinned(pairs: Sequence[tuple[int, float]]) -> Sequence[tuple[int, float]]:
    every = -(-len(pairs) // POINTS)
    kept = list(pairs[::every])
    return kept if kept[-1] == pairs[-1] else [*kept, pairs[-1]]


def _smoothed(values: Sequence[float]) -> list[float]:
    half = max(1, round(WINDOW * len(values) / 2))
    return [
        sum(part) / len(part)
        for i in range(len(values))
        for part in [values[max(0, i - half) : i + half + 1]]
    ]
