"""The weight that does best on the quantised model's inputs (GPTAQ: Li et al. 2025, in closed form).

min over V of sum over tokens |y W^T - x V^T|^2 = W + W (C - H) H'^-1
    y, x: inputs of the layer in the original and in the quantised model; C = sum y^T x, H = sum x^T x
"""

from __future__ import annotations

import torch
from torch import Tensor

from .curvature import Curvature, permute

AT_ONCE = 2**23  # weights corrected at once


def drift(cross: Tensor, curvature: Curvature) -> Tensor:
    """C - H in places, [K, K] float32, in the memory of C.

    Args:
        cross: C, [K, K], columns as they stand in the model.
        curvature: of x.
    """
    permute(cross, curvature.columns)
    mean = curvature.gram.diagonal().mean() / (1 + curvature.damp)
    cross.sub_(curvature.gram).diagonal().add_(curvature.damp * mean)  # H, not H'
    return cross


def corrected_weight(weight: Tensor, drift: Tensor, curvature: Curvature, strength: float = 1.0) -> Tensor:
    """W + strength W (C - H) H'^-1, [N, K] float32.

    Args:
        weight: W, [N, K].
        drift: C - H in places.
        curvature: of x.
        strength: 0 leaves W; 1 is the minimum, which a small calibration set takes too literally.
    """
    columns = curvature.columns
    corrected = weight.to(torch.float32, copy=True)
    step = max(1, AT_ONCE // weight.shape[1])
    for first in range(0, weight.shape[0], step):
        rows = corrected[first : first + step]
        right = rows[:, columns] @ drift  # [n, K] in places
        shift = torch.cholesky_solve(right.t().contiguous(), curvature.factor, upper=True)  # [K, n]
        rows[:, columns] += strength * shift.t()
    return corrected
