"""The weight that does best in the quantised model.

min over V of sum over tokens |s + y W^T - (r + x V^T)|^2 = W + (W D + E) H'^-1
    y, x: inputs of the layer in the original and in the quantised model
    s, r: what its output is added to there, the residual stream; 0 but for o_proj and down_proj
    D = sum (y - x)^T x, E = sum (s - r)^T x, H = sum x^T x

D is GPTAQ's (Li et al. 2025), in closed form: what the layer's own output lacks. E is what the residual
stream lacks already, as far as this layer's inputs tell of it.

In two steps, so that D is gone before H is factored: W D + E, then what that asks of the weight.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .curvature import Curvature

AT_ONCE = 2**23  # weights corrected at once


def missing_products(
    weights: Mapping[str, Tensor], drift: Tensor, residual_drift: Tensor | None = None
) -> dict[str, Tensor]:
    """W D + E, [N, K] float32, of each weight: what is lacking behind it, summed against x.

    Args:
        weights: W, [N, K] of any float dtype; a single one where there is E.
        drift: D, [K, K].
        residual_drift: E, [N, K], or None for 0.
    """
    found = {}
    for name, weight in weights.items():
        found[name] = torch.empty(weight.shape, device=drift.device)
        for rows in _slices(weight):
            torch.mm(weight[rows].to(torch.float32), drift, out=found[name][rows])
        if residual_drift is not None:
            found[name] += residual_drift
    return found


def corrected_weight(weight: Tensor, missing: Tensor, curvature: Curvature, strength: float = 1.0) -> Tensor:
    """W + strength (W D + E) H'^-1, [N, K] float32.

    Args:
        weight: W, [N, K].
        missing: W D + E; its memory becomes the result's.
        curvature: of x.
        strength: 0 leaves W; 1 is the minimum.
    """
    columns = curvature.columns
    for rows in _slices(weight):
        right = missing[rows].t()[columns]  # [K, n] in places
        # cholesky_solve would copy the factor, which is the largest thing in memory
        half = torch.linalg.solve_triangular(curvature.factor.t(), right, upper=False)
        shift = torch.linalg.solve_triangular(curvature.factor, half, upper=True)
        missing[rows] = weight[rows]
        missing[rows].t().index_add_(0, columns, shift, alpha=strength)
    return missing


def _slices(weight: Tensor) -> list[slice]:
    rows, width = weight.shape
    step = max(1, AT_ONCE // width)
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]
