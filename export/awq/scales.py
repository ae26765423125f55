"""Channel scales that leave rounding the least error, by what the error is expected to be.

    y = x W^T = (x / t) (W diag(t))^T                     the same for every t > 0, one for each input channel
    cost(t) = sum over groups g of  a[g](t) b[g](t)
        a[g] = sum over rows n of range[n, g]^2           range: of the group's scaled weights t[k] W[n, k]
        b[g] = sum over columns k of g of  c[k] / t[k]^2

A group's step is its range over the number of steps, and an error of size `step` in a scaled column k costs
c[k] / t[k]^2. Which c depends on what rounds:

    nearest   c[k] = H[k, k]     errors are independent of each other: E tr E H E^T = sum c e^2
    gptq      c[k] = R[k, k]^2   of H' = R^T R: what later columns can't make up for (rounding/curvature.py)

AWQ (Lin et al. 2023) tries t = x^alpha. Here the cheapest of those (with and without the weights' magnitude)
is where a descent on log t begins. Its gradient is 2 (M[k] b[g] - a[g] c[k] / t[k]^2), with M[k] the part of
a[g] whose range ends at column k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALPHAS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
STEPS = 30
RATE = 0.1  # of log t in the first step, falling to zero
MOMENTUM = 0.9
ROWS = 4096  # rows of a weight that are looked at, evenly spaced: a range is a property of many rows
BLOCK = 2**22  # weights scaled at once


@dataclass(frozen=True, slots=True)
class Part:
    """A weight that reads the scaled inputs.

    Attributes:
        weight: [N, K] of any float dtype, columns as they stand in the model.
        groups: [K] int64, the group of each column; all of one size.
        symmetric: steps are spread around zero.
        steps: of the grid: 2^bits - 1.
    """

    weight: Tensor
    groups: Tensor
    symmetric: bool
    steps: int


def channel_scales(
    parts: Sequence[Part], cost: Tensor, magnitude: Tensor, channels: Tensor | None = None
) -> list[Tensor]:
    """What to choose from, [C] float32 each, a value for each channel: first t of least cost(t), then others.

    The others are 1, x^alpha and x^alpha / w^(1 - alpha), with x the inputs' magnitude and w the weights'.

    Args:
        parts: all weights that read the inputs.
        cost: c, [K].
        magnitude: of each input, [K]: the root of its mean square.
        channels: [K] int64, the channel 0 .. C-1 behind each input, where several inputs share one (GQA);
            None where each has its own.
    """
    width = cost.numel()
    tied = torch.arange(width, device=cost.device) if channels is None else channels
    rows = [_Rows.of(part, cost) for part in parts]
    tried = _candidates(rows, magnitude, tied)
    costs = [_cost(rows, scales[tied]) for scales in tried]
    lowest = min(range(len(tried)), key=lambda index: costs[index])
    found = _descend(rows, tried[lowest], tied)
    return [found if _cost(rows, found[tied]) < costs[lowest] else tried[lowest], *tried]


def _descend(rows: Sequence[_Rows], start: Tensor, tied: Tensor) -> Tensor:
    log_scales = start.log()
    momentum = torch.zeros_like(log_scales)
    for step in range(STEPS):
        slope, size = torch.zeros_like(log_scales), torch.zeros_like(log_scales)
        scales = log_scales.exp()[tied]
        for its in rows:
            its.slope(scales, tied, slope, size)
        momentum.mul_(MOMENTUM).add_(slope.div_(size).clamp_(-1, 1), alpha=1 - MOMENTUM)
        log_scales.sub_(momentum, alpha=RATE * (1 - step / STEPS))
    return _centred(log_scales.exp())


def _cost(rows: Sequence[_Rows], scales: Tensor) -> float:
    return sum(its.cost(scales) for its in rows)


def _centred(scales: Tensor) -> Tensor:
    return scales / (scales.amax() * scales.amin()).sqrt()


def _candidates(rows: Sequence[_Rows], magnitude: Tensor, tied: Tensor) -> list[Tensor]:
    """1, x^alpha, and x^alpha / w^(1 - alpha) with w the weights' mean size relative to their groups'."""
    count = int(tied.max()) + 1
    of_inputs = _mean_by(magnitude.clamp(min=1e-8), tied, count)
    of_weights = _mean_by(torch.stack([its.relative_size() for its in rows]).mean(0), tied, count)
    found = [torch.ones(count, device=magnitude.device)]
    for alpha in ALPHAS:
        grown = of_inputs.pow(alpha)
        found += [grown, grown / (of_weights.pow(1 - alpha) + 1e-4)]
    return [_centred(t.clamp(1e-4 * float(t.max()))) for t in found]


def _mean_by(values: Tensor, tied: Tensor, count: int) -> Tensor:
    sums = torch.zeros(count, device=values.device).index_add_(0, tied, values)
    return sums / torch.bincount(tied, minlength=count)


class _Rows:
    """Rows of a part in groups: [G, L, N], L columns to a group."""

    def __init__(self, weight: Tensor, columns: Tensor, cost: Tensor, symmetric: bool) -> None:
        self._weight = weight
        self._columns = columns  # [G, L]
        self._cost = cost  # [K], with the steps' size in it
        self._symmetric = symmetric

    @classmethod
    def of(cls, part: Part, cost: Tensor) -> _Rows:
        """A part's evenly spaced rows, transposed."""
        every = -(-part.weight.shape[0] // ROWS)
        columns = torch.argsort(part.groups, stable=True)
        columns = columns.view(int(part.groups.max()) + 1, -1)
        weight = part.weight[::every].to(torch.float32).t()[columns]  # [G, L, N / every]
        weight = weight.abs_() if part.symmetric else weight
        return cls(weight, columns, cost * (every / part.steps**2), part.symmetric)

    def cost(self, scales: Tensor) -> float:
        """cost(t) of t, [K]."""
        return float(
            sum(
                (self._ranges(block, scales).square().sum(1) * self._b(block, scales).sum(1)).sum()
                for block in self._blocks()
            )
        )

    def slope(self, scales: Tensor, tied: Tensor, slope: Tensor, size: Tensor) -> None:
        """Add half of the gradient by log t to `slope`, and what it is measured by to `size`, [C]."""
        for block in self._blocks():
            scaled = self._weight[block] * scales[self._columns[block], None]
            by_end = torch.zeros(scaled.shape[:2], device=scaled.device)  # M, [G, L]
            high, top = scaled.max(1)  # [G, N]
            if self._symmetric:
                a = high.square()
                by_end.scatter_add_(1, top, a)
            else:
                low, bottom = scaled.min(1)
                high, low = high.clamp_(min=0), low.clamp_(max=0)
                span = high - low
                a = span.square()
                by_end.scatter_add_(1, top, span * high).scatter_add_(1, bottom, -span * low)
            a = a.sum(1, keepdim=True)
            b = self._b(block, scales)
            whole = b.sum(1, keepdim=True)
            channels = tied[self._columns[block]].view(-1)
            slope.index_add_(0, channels, (by_end * whole - a * b).view(-1))
            size.index_add_(0, channels, (a * whole / b.shape[1]).expand_as(b).reshape(-1))

    def relative_size(self) -> Tensor:
        """[K] mean over rows of |w| relative to the largest of its group."""
        found = torch.empty_like(self._cost)
        for block in self._blocks():
            sizes = self._weight[block].abs()
            found[self._columns[block]] = (sizes / sizes.amax(1, keepdim=True).clamp(min=1e-12)).mean(2)
        return found

    def _blocks(self) -> list[slice]:
        count, length, rows = self._weight.shape
        at_once = max(1, BLOCK // (length * rows))
        return [slice(first, first + at_once) for first in range(0, count, at_once)]

    def _b(self, block: slice, scales: Tensor) -> Tensor:
        columns = self._columns[block]
        return self._cost[columns] / scales[columns].square()  # [G, L]

    def _ranges(self, block: slice, scales: Tensor) -> Tensor:
        scaled = self._weight[block] * scales[self._columns[block], None]
        if self._symmetric:
            return scaled.amax(1)
        return scaled.amax(1).clamp_(min=0) - scaled.amin(1).clamp_(max=0)  # [G, N]
