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

ALPHAS = (0.25, 0.5, 0.75)
STEPS = 20
RATE = 0.1  # of log t in the first step, falling to zero
MOMENTUM = 0.9
ROWS = 16  # of a weight that are looked at for each column of a group, evenly spaced
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
    tied = _Tied(torch.arange(cost.numel(), device=cost.device) if channels is None else channels)
    rows = [_Rows.of(part, cost) for part in parts]
    tried = _candidates(rows, magnitude, tied)
    costs = [_cost(rows, tied.spread(scales)) for scales in tried]
    lowest = min(range(len(tried)), key=lambda index: costs[index])
    found = _descend(rows, tried[lowest], tied)
    return [found if _cost(rows, tied.spread(found)) < costs[lowest] else tried[lowest], *tried]


class _Tied:
    """Inputs and the channels behind them, as many to each; sums in a fixed order on any device."""

    def __init__(self, channels: Tensor) -> None:
        self._channels = channels
        self._members = torch.argsort(channels, stable=True).view(int(channels.max()) + 1, -1)

    def spread(self, scales: Tensor) -> Tensor:
        """[C] -> [K]."""
        return scales[self._channels]

    def sum(self, values: Tensor) -> Tensor:
        """[K] -> [C]."""
        return values[self._members].sum(1)

    def mean(self, values: Tensor) -> Tensor:
        """[K] -> [C]."""
        return values[self._members].mean(1)


def _descend(rows: Sequence[_Rows], start: Tensor, tied: _Tied) -> Tensor:
    log_scales = start.log()
    momentum = torch.zeros_like(log_scales)
    for step in range(STEPS):
        scales = tied.spread(log_scales.exp())
        slope, size = torch.zeros_like(scales), torch.zeros_like(scales)
        for its in rows:
            its.slope(scales, slope, size)
        sizes = tied.sum(size).clamp_(min=torch.finfo(torch.float32).tiny)  # groups of zeros have none
        wanted = (tied.sum(slope) / sizes).clamp_(-1, 1)
        momentum.mul_(MOMENTUM).add_(wanted, alpha=1 - MOMENTUM)
        log_scales.sub_(momentum, alpha=RATE * (1 - step / STEPS))
    return _centred(log_scales.exp())


def _cost(rows: Sequence[_Rows], scales: Tensor) -> float:
    return sum(its.cost(scales) for its in rows)


def _centred(scales: Tensor) -> Tensor:
    return scales / (scales.amax() * scales.amin()).sqrt()


def _candidates(rows: Sequence[_Rows], magnitude: Tensor, tied: _Tied) -> list[Tensor]:
    """1, x^alpha, and x^alpha / w^(1 - alpha) with w the weights' mean size relative to their groups'."""
    of_inputs = tied.mean(magnitude.clamp(min=1e-8))
    of_weights = tied.mean(torch.stack([its.relative_size() for its in rows]).mean(0))
    found = [torch.ones_like(of_inputs)]
    for alpha in ALPHAS:
        grown = of_inputs.pow(alpha)
        found += [grown, grown / (of_weights.pow(1 - alpha) + 1e-4)]
    return [_centred(t.clamp(1e-4 * float(t.max()))) for t in found]


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
        columns = torch.argsort(part.groups, stable=True)
        columns = columns.view(int(part.groups.max()) + 1, -1)  # [G, L]
        every = -(-part.weight.shape[0] // (ROWS * columns.shape[1]))
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

    def slope(self, scales: Tensor, slope: Tensor, size: Tensor) -> None:
        """Add half of the gradient by log t to `slope`, and what it is measured by to `size`, [K]."""
        for block in self._blocks():
            scaled = self._weight[block] * scales[self._columns[block], None]
            high = scaled.amax(1, keepdim=True)  # [G, 1, N]
            if self._symmetric:
                span = high
                ends = _sums_where(scaled == high, high.square())
            else:
                low = scaled.amin(1, keepdim=True)
                span = high.clamp(min=0) - low.clamp(max=0)
                ends = _sums_where(scaled == high, span * high.clamp(min=0))
                ends -= _sums_where(scaled == low, span * low.clamp(max=0))
            a = span.square().sum(2)  # [G, 1]
            b = self._b(block, scales)  # [G, L]
            whole = b.sum(1, keepdim=True)
            columns = self._columns[block]
            slope[columns] += ends * whole - a * b
            size[columns] += a * whole / b.shape[1]

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


def _sums_where(mask: Tensor, values: Tensor) -> Tensor:
    """[G, L, N] bool, [G, 1, N] -> [G, L]."""
    return (mask.to(values.dtype) @ values.transpose(1, 2))[..., 0]
