"""Scales and zero points, and rounding to the grid that they span.

Weights lie transposed here, [K, N], so that a column of W is contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats.scheme import Scheme

AT_ONCE = 2**18  # weights whose candidates are tried at once: they stay in a core's cache
SMALLEST = 2.0**-20  # of a scale, in float16; an all-zero group has some scale too
# The range that a group's scale covers, relative to what its largest weight needs. Clipping down to a half
# pays where the largest weight meets inputs that are small; above 1 the largest falls on a step.
RANGES = tuple(0.5 + 0.025 * step for step in range(23))


@dataclass(frozen=True, slots=True)
class Grid:
    """what[k, n] = scales[g, n] (q - zeros[g, n]) with g = groups[k] and q in 0 .. top.

    Attributes:
        scales: [G, N] float32 whose values are float16's.
        zeros: [G, N] float32, integers.
        groups: [K] int64.
        top: the largest q.
    """

    scales: Tensor
    zeros: Tensor
    groups: Tensor
    top: int

    def dequantize(self, q: Tensor) -> Tensor:
        """[K, N] float32 of q, [K, N] float32."""
        return (q - self.zeros[self.groups]).mul_(self.scales[self.groups])

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Of q - zeros, [G, N] each."""
        return -self.zeros, self.top - self.zeros

    def with_scales(self, scales: Tensor) -> Grid:
        """The same zeros with other scales, rounded to float16."""
        return Grid(storable(scales), self.zeros, self.groups, self.top)


def nearest(values: Tensor, scales: Tensor, zeros: Tensor, top: int) -> Tensor:
    """clamp(round(values / scales) + zeros, 0, top), ties to even; float32."""
    return torch.div(values, scales).round_().add_(zeros).clamp_(0, top)


def storable(scales: Tensor) -> Tensor:
    """Rounded to float16, not smaller than it can tell from zero; a negative scale stays negative."""
    sign = torch.where(scales < 0, -1.0, 1.0)
    return (scales.abs().clamp_(min=SMALLEST) * sign).to(torch.float16).to(torch.float32)


def search_grid(
    weight: Tensor,
    importance: Tensor,
    scheme: Scheme,
    groups: Tensor,
    *,
    lowest_zero: int = 0,
    ranges: Sequence[float] = RANGES,
) -> Grid:
    """The scales and zeros that minimise sum over k of importance[k] (what[k, n] - weight[k, n])^2.

    A symmetric scale takes the sign that sends the group's largest weight to q = 0: all 2^bits steps are then
    used, where a positive one leaves the lowest to nothing.

    Args:
        weight: [K, N] float32.
        importance: [K], not negative.
        scheme: bits, group size, symmetry.
        groups: [K] int64, the group of each row of `weight`.
        lowest_zero: 1 where a format's readers disagree on a zero of 0.
        ranges: that a scale may cover, relative to what the group's largest weight needs.
    """
    by_group = torch.argsort(groups, stable=True)
    count = scheme.groups(weight.shape[0])
    rows = weight[by_group].view(count, -1, weight.shape[1])  # [G, K / G, N]
    cost = importance[by_group].view(count, -1, 1)
    high, low = rows.amax(1), rows.amin(1)
    if scheme.symmetric:
        base = torch.where(high > -low, -1.0, 1.0) * torch.maximum(high, -low) / scheme.middle
        zeros = torch.full_like(base, scheme.middle)
    else:
        high, low = high.clamp_(min=0), low.clamp_(max=0)
        base = (high - low) / scheme.top
        zeros = (-low / base.clamp(min=SMALLEST)).round_().clamp_(lowest_zero, scheme.top)
    scales = torch.empty_like(base)
    at_once = max(1, AT_ONCE // rows[0].numel())
    for first in range(0, count, at_once):
        part = slice(first, first + at_once)
        scales[part] = _search(rows[part], cost[part], base[part], zeros[part], scheme.top, ranges)
    return Grid(scales, zeros, groups, scheme.top)


def _search(
    rows: Tensor, cost: Tensor, base: Tensor, zeros: Tensor, top: int, ranges: Sequence[float]
) -> Tensor:
    """[G, N] of some groups: rows [G, L, N], cost [G, L, 1]."""
    best = torch.full_like(base, float("inf"))
    scales = storable(base)
    for covered in ranges:
        candidate = storable(base * covered)
        what = nearest(rows, candidate[:, None], zeros[:, None], top)
        what.sub_(zeros[:, None]).mul_(candidate[:, None])
        error = what.sub_(rows).square_().mul_(cost).sum(1)  # [G, N]
        better = error < best
        best = torch.where(better, error, best)
        scales = torch.where(better, candidate, scales)
    return scales
