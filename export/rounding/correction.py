"""The weight that does best on the quantised model's inputs (GPTAQ: Li et al. 2025, in closed form).

min over V of sum over tokens |y W^T - x V^T|^2 = W + W D H'^-1
    y, x: inputs of the layer in the original and in the quantised model; D = sum (y - x)^T x, H = sum x^T x

In two steps, so that D is gone before H is factored: W D, then what that asks of the weight.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .curvature import Curvature

AT_ONCE = 2**23  # weights corrected at once


def missing_products(weights: Mapping[str, Tensor], drift: Tensor) -> dict[str, Tensor]:
    """W D, [N, K] float32, of each weight: what its outputs lack, summed against x.

    Args:
        weights: W, [N, K] of any float dtype.
        drift: D, [K, K].
    """
    found = {}
    for name, weight in weights.items():
        found[name] = torch.empty(weight.shape, device=drift.device)
        for rows in _slices(weight):
            torch.mm(weight[rows].to(torch.float32), drift, out=found[name][rows])
    return found


def corrected_weight(weight: Tensor, missing: Tensor, curvature: Curvature, strength: float = 1.0) -> Tensor:
    """W + strength W D H'^-1, [N, K] float32.

    Args:
        weight: W, [N, K].
        missing: W D; its memory becomes the result's.
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
