"""How the output error of a linear layer depends on its weight's error, factored for rounding.

    sum over tokens |x E^T|^2 = tr E H E^T          E = What - W [N, K],  H = sum x^T x [K, K]
    H' = H + damp mean(diag H) I = R^T R            R upper triangular
    tr E H' E^T = sum over rows and k of (R[k, k] e[k] + sum over l > k of R[k, l] e[l])^2

so that columns rounded from the last to the first can each make up for those before (Babai's nearest plane;
GPTQ, Frantar et al. 2022, is the same method written with the inverse of H: Chen et al. 2025). R[k, k]^2 is
what an error in column k costs after the columns still to come have made up for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import ExportError
from .cholesky import factor_in_place

ActOrder = Literal["static", "off", "full"]
DAMPING = (1, 3, 10, 30, 100)  # times the damping asked for, until H' can be factored
MOST_DAMPING = 1.0


@dataclass(frozen=True, slots=True)
class Curvature:
    """H' and R of inputs whose columns were put in places; the last place is rounded first.

    Attributes:
        columns: [K] int64, the column at each place.
        gram: [K, K] float32, H' in places.
        factor: [K, K] float32, R in places.
        damp: the damping that was needed, relative to mean(diag H).
        dead: columns whose input was always zero.
    """

    columns: Tensor
    gram: Tensor
    factor: Tensor
    damp: float
    dead: int

    @property
    def activity(self) -> Tensor:
        """[K] H'[k, k] by place: what an error in a column costs while all others have none.

        Scales are searched with it, although R[k, k]^2 leaves 7 % less error in a layer's output: the whole
        model's divergence is a fifth larger with R[k, k]^2 (docs/lab-log.md).
        """
        return self.gram.diagonal()

    @property
    def importance(self) -> Tensor:
        """[K] R[k, k]^2 by place: the cost of an error that later columns can't make up for."""
        return self.factor.diagonal().square()


def curvature(gram: Tensor, *, order: ActOrder = "static", damp: float = 0.01, name: str = "") -> Curvature:
    """Order and factor the Gram matrix of a layer's inputs.

    Args:
        gram: H, [K, K] float32; its memory is taken over and permuted in place. R takes as much again.
        order: `off` rounds columns as they stand; `static` and `full` by descending diag(H).
        damp: relative to the mean of diag(H); more is tried where H' is not positive definite.
        name: of the module, for errors.

    Raises:
        ExportError: H is not finite, or can't be factored at the most damping.
    """
    diagonal = gram.diagonal().clone()
    if not bool(torch.isfinite(diagonal).all()):
        raise ExportError(
            f"{name}: the activations at its input overflow or are NaN; calibrate in float32 (--dtype fp32), "
            "or look for damaged weights in the layers before"
        )
    columns = _in_places(diagonal, order)
    _permute(gram, columns)
    mean = float(diagonal.mean()) or 1.0  # inputs that are all zero leave the identity
    added = 0.0
    factor = torch.empty_like(gram)
    for damping in sorted({min(damp * times, MOST_DAMPING) for times in DAMPING}):
        gram.diagonal().add_((damping - added) * mean)
        added = damping
        if factor_in_place(factor.copy_(gram)):
            return Curvature(columns, gram, factor, damping, int((diagonal == 0).sum()))
    raise ExportError(
        f"{name}: the Gram matrix of its inputs is not positive definite, even with {added:g} of its mean "
        "diagonal added; more calibration rows may help (--calib), or leave the module in 16 bits "
        f"(--set modules.{name.rpartition('.')[2]}.bits=16)"
    )


def _in_places(diagonal: Tensor, order: ActOrder) -> Tensor:
    if order == "off":
        return torch.arange(diagonal.numel() - 1, -1, -1, device=diagonal.device)
    return torch.argsort(diagonal, stable=True)  # the most active column last, where rounding begins


def _permute(matrix: Tensor, columns: Tensor) -> None:
    """matrix[columns][:, columns] in its own memory, a strip at a time."""
    for strip in _strips(matrix):
        matrix[:, strip] = matrix[:, strip][columns]
    for strip in _strips(matrix):
        matrix[strip] = matrix[strip][:, columns]


def _strips(matrix: Tensor) -> Iterator[slice]:
    width = max(1, 2**22 // matrix.shape[0])
    for first in range(0, matrix.shape[0], width):
        yield slice(first, min(first + width, matrix.shape[0]))
