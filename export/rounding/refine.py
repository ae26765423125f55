"""Better integers and scales after rounding, on the whole quadratic form: neither step can raise it.

Both are exact minimisations: of the scales with the integers held, and of one column's integers with all else
held. Rounding with feedback leaves something to both, as it never looks back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .feedback import BLOCK
from .grid import Grid
from .threads import product

STRIP = 512  # rows of R in one product
RIDGE = 1e-6  # towards the old scales, relative to the mean diagonal: groups that no input reaches keep them


def output_energy(weight: Tensor, factor: Tensor) -> Tensor:
    """[N] |R w|^2 = w H' w^T for each row of W, [K, N]: half the products that H' would take."""
    width = weight.shape[0]
    energy = torch.zeros_like(weight[0])
    for first in range(0, width, STRIP):
        energy += product(factor[first : first + STRIP, first:], weight[first:]).square_().sum(0)
    return energy


def least_squares_scales(weight_gram: Tensor, q: Tensor, gram: Tensor, grid: Grid) -> Grid:
    """argmin over scales of tr E H' E^T, all groups of a row together: a G x G system for each row.

    Args:
        weight_gram: H' W^T, [K, N] in places.
        q: [K, N] in places.
        gram: H', [K, K].
    """
    count, rows = grid.scales.shape
    by_group = torch.argsort(grid.groups, stable=True)
    steps = (q - grid.zeros[grid.groups])[by_group]  # [K, N] from here on group by group
    length = steps.shape[0] // count
    system = torch.empty(rows, count, count, device=q.device)
    for group, members in enumerate(by_group.view(count, length)):
        first = group * length  # the system is symmetric: this group with itself and those after it
        reached = product(gram[members][:, by_group[first:]].t(), steps[first : first + length])
        found = reached.mul_(steps[first:]).view(-1, length, rows).sum(1).t()  # [N, G - group]
        system[:, group:, group] = found
        system[:, group, group:] = found
    right = (weight_gram[by_group] * steps).view(count, length, rows).sum(1).t()  # [N, G]
    diagonal = system.diagonal(dim1=1, dim2=2)
    ridge = (RIDGE * diagonal.mean(1, keepdim=True)).clamp_(min=torch.finfo(torch.float32).tiny)
    right = right + ridge * grid.scales.t()
    diagonal.add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(system)
    found = torch.cholesky_solve(right[:, :, None], factor)[:, :, 0]  # [N, G]
    sound = (failed == 0)[:, None] & torch.isfinite(found)
    new = grid.with_scales(torch.where(sound, found, grid.scales.t()).t().contiguous())
    # rounding to float16, or a system at the edge, can have made a row worse: it keeps its old scales
    better = _objective(system, right, new.scales) <= _objective(system, right, grid.scales)
    return grid.with_scales(torch.where(better, new.scales, grid.scales))


def _objective(system: Tensor, right: Tensor, scales: Tensor) -> Tensor:
    """[N] s A s - 2 b s, what a row's error depends on its scales by: [G, N]."""
    s = scales.t()[:, :, None]  # [N, G, 1]
    return ((system @ s - 2 * right[:, :, None]) * s).sum((1, 2))


def descend(weight: Tensor, q: Tensor, gram: Tensor, grid: Grid) -> Tensor:
    """One sweep of coordinate descent: each column's integers are the best with all others held.

        q[k] = nearest(what[k] - (H' e)[k] / H'[k, k]),  from the first place to the last

    Args:
        weight, q: [K, N] in places.
        gram: H', [K, K].

    Returns:
        [K, N] float32, integers.
    """
    width = weight.shape[0]
    groups = grid.groups.tolist()
    pivots = gram.diagonal()
    lowest, highest = grid.bounds()
    found = torch.empty_like(q)
    what = grid.dequantize(q)
    error = what - weight
    for first in range(0, width, BLOCK):
        block = slice(first, min(first + BLOCK, width))
        rows = gram[block] / pivots[block, None]
        wanted = what[block] - product(rows, error)
        within = rows[:, block]
        moved = torch.empty_like(wanted)
        for place in range(wanted.shape[0]):
            group = groups[first + place]
            scales, target = grid.scales[group], wanted[place]
            if place:
                target.sub_(within[place, :place] @ moved[:place])
            steps = torch.div(target, scales, out=found[first + place]).round_()  # from the zero point
            steps.clamp_(lowest[group], highest[group])
            torch.sub(steps * scales, what[first + place], out=moved[place])
        error[block] += moved
    return found.add_(grid.zeros[grid.groups])
