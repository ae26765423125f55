"""AWQ's choice of scales: those whose nearest rounding leaves the output the least error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..formats.scheme import Scheme
from ..rounding.curvature import Curvature
from ..rounding.grid import nearest, search_grid

ROWS = 256  # rows of a weight that are rounded to compare, evenly spaced: errors are sums over rows


def least_error(
    candidates: Sequence[Tensor],
    weights: Mapping[str, Tensor],
    schemes: Mapping[str, Scheme],
    found: Curvature,
    ranges: Sequence[float],
    channels: Tensor,
) -> Tensor:
    """The candidate t for which  sum over weights of tr E H E^T  is least, E = nearest(W diag(t)) / t - W.

    Args:
        candidates: [C] each.
        weights: [N, K] by module.
        schemes: of each.
        found: of the inputs, not scaled.
        ranges: that scales are searched among.
        channels: [K], the channel behind each input.
    """
    samples = {name: its[:: -(-its.shape[0] // ROWS)] for name, its in weights.items()}

    def error(scales: Tensor) -> float:
        return sum(
            _error(rows, schemes[name], found, scales[channels], ranges) * (len(weights[name]) / len(rows))
            for name, rows in samples.items()
        )

    errors = [error(scales) for scales in candidates]
    return candidates[min(range(len(errors)), key=lambda index: errors[index])]


def _error(rows: Tensor, scheme: Scheme, found: Curvature, scales: Tensor, ranges: Sequence[float]) -> float:
    t = scales[found.columns, None]
    wanted = rows.to(torch.float32).t()[found.columns].mul_(t)  # [K, n] in places
    groups = found.columns.div(scheme.group_length(len(wanted)), rounding_mode="floor")
    activity = found.gram.diagonal() / t[:, 0].square()
    grid = search_grid(wanted, activity, scheme, groups, ranges=ranges)
    q = nearest(wanted, grid.scales[groups], grid.zeros[groups], grid.top)
    missed = grid.dequantize(q).sub_(wanted).div_(t)
    return float((found.gram @ missed).mul_(missed).sum())
