"""Rounding with feedback: GPTQ, as Babai's nearest plane on the factor of H (see curvature.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from .grid import Grid
from .threads import product

BLOCK = 64  # places whose feedback goes column by column; that of all others comes by one product


def round_with_feedback(weight: Tensor, factor: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """q that minimises tr E H' E^T greedily, column by column from the last place to the first.

        u[k] = w[k] - (sum over l > k of R[k, l] e[l]) / R[k, k]      q[k] = nearest(u[k])

    Args:
        weight: [K, N] float32 in places.
        factor: R, [K, K].
        grid: in places.

    Returns:
        q, [K, N] float32, integers 0 .. top; and tr E H' E^T by row of W, [N], which is the sum of
        (R[k, k] (what[k] - u[k]))^2.
    """
    width = weight.shape[0]
    groups = grid.groups.tolist()
    pivots = factor.diagonal()
    lowest, highest = grid.bounds()
    error = torch.zeros_like(weight)
    q = torch.empty_like(weight)
    cost = torch.zeros_like(weight[0])
    for last in range(width, 0, -BLOCK):
        first = max(0, last - BLOCK)
        block = slice(first, last)
        rows = factor[block] / pivots[block, None]
        wanted = weight[block] - product(rows[:, last:], error[last:])
        within, done = rows[:, block], error[block]
        left = torch.empty_like(wanted)  # what the columns still to come can't make up for
        for place in range(last - first - 1, -1, -1):
            group = groups[first + place]
            scales, target = grid.scales[group], wanted[place]
            if place + 1 < last - first:
                target.sub_(within[place, place + 1 :] @ done[place + 1 :])
            steps = torch.div(target, scales, out=q[first + place]).round_()  # from the zero point
            what = steps.clamp_(lowest[group], highest[group]) * scales
            torch.sub(what, weight[first + place], out=done[place])
            torch.sub(what, target, out=left[place])
        cost += left.mul_(pivots[block, None]).square_().sum(0)
    return q.add_(grid.zeros[grid.groups]), cost
