"""Scales and ticks. Places are percentages of the plot's box, so that a plot takes any width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Axis:
    """From `low` to `high`, linear or logarithmic; a logarithmic one has low > 0."""

    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        """Per cent from the low end, cut off at the ends."""
        if self.log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return 100 * min(1.0, max(0.0, share))

    def ticks(self, about: int = 5) -> list[float]:
        """Round values inside."""
        return _log_ticks(self, about) if self.log else _linear_ticks(self, about)


def from_zero(values: Sequence[float], room: float = 1.04) -> Axis:
    """Linear, from 0 to a little beyond the largest."""
    return Axis(0.0, room * max([*values, 0.0]) or 1.0)


def around(values: Sequence[float], room: float = 0.05) -> Axis:
    """Linear, with a margin on both sides."""
    low, high = min(values), max(values)
    margin = room * (high - low) or abs(high) or 1.0
    return Axis(low - margin, high + margin)


def logarithmic(values: Sequence[float], room: float = 1.25) -> Axis:
    """Over values > 0, with a margin on both sides."""
    return Axis(min(values) / room, max(values) * room, log=True)


def _linear_ticks(axis: Axis, about: int) -> list[float]:
    rough = (axis.high - axis.low) / max(1, about)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(axis.low / step - 1e-9)
    last = math.floor(axis.high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _log_ticks(axis: Axis, about: int) -> list[float]:
    """Powers of ten, with 2 and 5 between them where there are few."""
    powers = range(math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [factor * 10.0**power for power in powers for factor in factors]
        inside = [value for value in found if axis.low <= value <= axis.high]
        if len(inside) >= min(about, 4):
            break
    every = -(-len(inside) // (2 * about))
    return inside[::every]


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The places moved apart until they are `gap` from each other, in their order, inside [low, high]."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = [float(place) for place in places]
    previous = low - gap
    for i in order:
        moved[i] = previous = max(moved[i], previous + gap)
    following = high + gap
    for i in reversed(order):
        moved[i] = following = min(moved[i], following - gap)
    return moved
