"""H = R^T R in the memory of H: what torch.linalg needs beside the matrix is too much where K is large."""

from __future__ import annotations

import torch
from torch import Tensor

SMALL = 4096  # columns up to which LAPACK's own, in float64 if need be, takes little
PANEL = 512  # rows factored at once
STRIP = 2048  # rows that one product brings up to date


def factor_in_place(matrix: Tensor) -> bool:
    """Replace a symmetric matrix [K, K] float32 by R, upper triangular with a positive diagonal.

    Right-looking, a panel of rows at a time; only the upper triangle is read. Small matrices that float32
    can't factor are tried in float64.

    Returns:
        Whether the matrix was positive definite; if not, what is in its memory is of no use.
    """
    if matrix.shape[0] <= SMALL:
        return _small(matrix)
    width = matrix.shape[0]
    for first in range(0, width, PANEL):
        last = min(first + PANEL, width)
        corner = matrix[first:last, first:last]
        factor, failed = torch.linalg.cholesky_ex(corner, upper=True)
        if int(failed) or not _sound(factor):
            return False
        corner.copy_(factor)
        matrix[last:, first:last] = 0.0
        if last == width:
            break
        panel = matrix[first:last, last:]
        panel.copy_(torch.linalg.solve_triangular(factor.t(), panel, upper=False))  # R11^T R12 = H12
        for row in range(last, width, STRIP):
            strip = panel[:, row - last : row - last + STRIP]
            matrix[row : row + STRIP, row:].addmm_(strip.t(), panel[:, row - last :], alpha=-1)
    return True


def _small(matrix: Tensor) -> bool:
    for dtype in (torch.float32, torch.float64):
        factor, failed = torch.linalg.cholesky_ex(matrix.to(dtype), upper=True)
        factor = factor.to(torch.float32)
        if not int(failed) and _sound(factor):
            matrix.copy_(factor)
            return True
    return False


def _sound(factor: Tensor) -> bool:
    smallest = float(factor.diagonal().min())  # NaN passes no comparison
    return smallest > 0 and bool(torch.isfinite(factor.diagonal().max()))
