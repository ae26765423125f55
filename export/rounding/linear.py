"""One linear layer's weight to a grid: the nearest values, or those that GPTQ's feedback finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import ExportError
from ..formats.quantized import QuantizedLinear
from ..formats.scheme import Scheme
from .curvature import Curvature
from .feedback import round_with_feedback
from .grid import Grid, nearest, search_grid
from .refine import descend, least_squares_scales, output_error

Rounding = Literal["nearest", "gptq"]
ROWS = 4096  # rows of W rounded at once: they do not depend on each other, and memory goes with them


@dataclass(frozen=True, slots=True)
class Rounded:
    """A quantised layer and what it costs.

    Attributes:
        linear: the integers, scales and zeros.
        error: tr E H' E^T / tr W H' W^T, the relative squared error of the layer's output on its inputs.
    """

    linear: QuantizedLinear
    error: float


def round_linear(
    weight: Tensor,
    curvature: Curvature,
    scheme: Scheme,
    *,
    rounding: Rounding = "gptq",
    refine: int = 2,
    lowest_zero: int = 0,
    name: str = "",
) -> Rounded:
    """Quantise W [N, K] for inputs with a curvature.

    Args:
        weight: any float dtype.
        curvature: of the inputs, ordered `full` where scheme.desc_act.
        scheme: bits, group size, symmetry, order; the group size divides K.
        rounding: `nearest` chooses scales by the curvature, then the nearest values.
        refine: rounds of least-squares scales and coordinate descent after rounding with feedback.
        lowest_zero: of asymmetric zeros; GPTQ's readers disagree on 0.
        name: of the module, for errors.

    Raises:
        ExportError: the weight is not finite, or needs scales beyond float16.
    """
    rows = [
        _round_rows(part, curvature, scheme, rounding, refine, lowest_zero) for part in weight.split(ROWS)
    ]
    scales = torch.cat([part.grid.scales for part in rows], dim=1).t()
    if not bool(torch.isfinite(scales).all()):
        raise ExportError(f"{name}: its weights are NaN, infinite, or need scales beyond float16")
    zeros = None
    if not scheme.symmetric:
        zeros = torch.cat([part.grid.zeros for part in rows], dim=1).t().contiguous().to(torch.uint8)
    linear = QuantizedLinear(
        q=torch.cat([part.q for part in rows]),
        scales=scales.contiguous().to(torch.float16),
        zeros=zeros,
        g_idx=_g_idx(curvature, scheme),
        bits=scheme.bits,
        group_size=scheme.group_size,
    )
    whole = sum(part.whole for part in rows)
    return Rounded(linear, sum(part.error for part in rows) / whole if whole else 0.0)


@dataclass(frozen=True, slots=True)
class _Rows:
    q: Tensor  # [n, K] uint8, columns as they stand in the model
    grid: Grid
    error: float
    whole: float


def _round_rows(
    weight: Tensor, curvature: Curvature, scheme: Scheme, rounding: Rounding, refine: int, lowest_zero: int
) -> _Rows:
    placed = weight.to(torch.float32).t()[curvature.columns]  # [K, n] in places
    groups = _groups(curvature, scheme)
    grid = search_grid(placed, curvature.importance, scheme, groups, lowest_zero=lowest_zero)
    if rounding == "nearest":
        q = nearest(placed, grid.scales[groups], grid.zeros[groups], grid.top)
    else:
        q = round_with_feedback(placed, curvature.factor, grid)
        for _ in range(refine):
            grid = least_squares_scales(placed, q, curvature.gram, grid)
            q = descend(placed, q, curvature.gram, grid)
    error = output_error(placed, grid.dequantize(q), curvature.gram)
    whole = output_error(placed, torch.zeros_like(placed), curvature.gram)
    in_model = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    in_model[:, curvature.columns] = q.t().to(torch.uint8)
    return _Rows(in_model, grid, float(error.sum()), float(whole.sum()))


def _groups(curvature: Curvature, scheme: Scheme) -> Tensor:
    """[K] the group of each place."""
    width = curvature.columns.numel()
    length = scheme.group_length(width)
    places = torch.arange(width, device=curvature.columns.device)
    if scheme.desc_act:  # groups of columns that are rounded one after the other
        return (width - 1 - places).div(length, rounding_mode="floor")
    return curvature.columns.div(length, rounding_mode="floor")


def _g_idx(curvature: Curvature, scheme: Scheme) -> Tensor | None:
    if not scheme.desc_act:
        return None
    g_idx = torch.empty(curvature.columns.numel(), dtype=torch.int32, device=curvature.columns.device)
    g_idx[curvature.columns] = _groups(curvature, scheme).to(torch.int32)
    return g_idx
