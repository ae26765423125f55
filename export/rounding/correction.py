"""The weight that does best on the quantised model's inputs (GPTAQ: Li et al. 2025, in closed form).

min over V of sum over tokens |y W^T - x V^T|^2 = W + W (C - H) H'^-1
    y, x: inputs of the layer in the original and in the quantised model; C = sum y^T x, H = sum x^T x
"""

from __future__ import annotations

import torch
from torch import Tensor

from .curvature import Curvature


def corrected_weight(weight: Tensor, cross: Tensor, curvature: Curvature, strength: float = 1.0) -> Tensor:
    """W + strength W (C - H) H'^-1, [N, K] float32.

    Args:
        weight: W, [N, K].
        cross: C, [K, K], columns as they stand in the model.
        curvature: of x.
        strength: 0 leaves W; 1 is the minimum, which a small calibration set takes too literally.
    """
    columns = curvature.columns
    placed = weight.to(torch.float32)[:, columns]  # [N, K] in places
    mean = (curvature.gram.diagonal().mean() / (1 + curvature.damp)).to(torch.float32)
    difference = cross[columns][:, columns] - curvature.gram
    difference.diagonal().add_(curvature.damp * mean)  # H, not H'
    right = placed @ difference  # [N, K]
    shift = torch.cholesky_solve(right.t().contiguous(), curvature.factor, upper=True).t()
    corrected = torch.empty_like(placed)
    corrected[:, columns] = placed + strength * shift
    return corrected
