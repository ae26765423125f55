"""One linear layer's weight to a grid: the nearest values, or those that GPTQ's feedback finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import ExportError
from ..formats.quantized import QuantizedLinear
from ..formats.scheme import Scheme
from ..memory import release_free_memory
from .curvature import Curvature
from .feedback import round_with_feedback
from .grid import RANGES, nearest, search_grid
from .refine import descend, least_squares_scales, output_energy
from .threads import few_threads, product

Rounding = Literal["nearest", "gptq"]
AT_ONCE = 2**23  # weights rounded at once: rows do not depend on each other, and memory goes with them


@dataclass(frozen=True, slots=True)
class Rounded:
    """A quantised layer and what it costs.

    Attributes:
        linear: the integers, scales and zeros.
        error: tr E H' E^T / tr W H' W^T, the relative squared error of the layer's output on its inputs.
    """

    linear: QuantizedLinear
    error: float


def round_linear(weight: Tensor, curvature: Curvature, scheme: Scheme, **options: Any) -> Rounded:
    """`round_linears` of one weight."""
    return round_linears([weight], curvature, scheme, **options)[0]


def round_linears(
    weights: Sequence[Tensor],
    curvature: Curvature,
    scheme: Scheme,
    *,
    rounding: Rounding = "gptq",
    refine: int = 1,
    lowest_zero: int = 0,
    ranges: Sequence[float] = RANGES,
    names: Sequence[str] = (),
) -> list[Rounded]:
    """Quantise weights [N, K] of layers that read the same inputs.

    Args:
        weights: any float dtype.
        curvature: of the inputs, ordered `full` where scheme.desc_act.
        scheme: bits, group size, symmetry, order; the group size divides K.
        rounding: `nearest` chooses scales by the inputs' activity, then the nearest values.
        refine: rounds of least-squares scales and coordinate descent after rounding with feedback.
        lowest_zero: of asymmetric zeros; GPTQ's readers disagree on 0.
        ranges: that scales are searched among (grid.py); (1,) for those that the largest weights need.
        names: of the modules, for errors.

    Raises:
        ExportError: a weight is not finite, or needs scales beyond float16.
    """
    sizes = [weight.shape[0] for weight in weights]
    at_once = max(1, AT_ONCE // weights[0].shape[1])
    if sum(sizes) > at_once or len(weights) == 1:
        groups = [[weight] for weight in weights]
    else:
        groups = [list(weights)]  # rows do not depend on each other, and few at a time cost as much as many
    rows = []
    with few_threads(sum(sizes) * weights[0].shape[1]):
        for group in groups:
            parts = (torch.cat(group) if len(group) > 1 else group[0]).split(at_once)
            for part in parts:
                if len(parts) > 1:
                    release_free_memory()  # each leaves holes in the heap, beside the largest matrices
                rows.append(_round_rows(part, curvature, scheme, rounding, refine, lowest_zero, ranges))
    whole = _Rows(*(torch.cat(parts) for parts in zip(*map(_fields, rows), strict=True)))
    g_idx = _g_idx(curvature, scheme)
    found = []
    for index, parts in enumerate(zip(*(field.split(sizes) for field in _fields(whole)), strict=True)):
        part = _Rows(*parts)
        if not bool(torch.isfinite(part.scales).all()):
            name = names[index] if names else "a weight"
            raise ExportError(f"{name}: its weights are NaN, infinite, or need scales beyond float16")
        linear = QuantizedLinear(
            q=part.q.clone(),
            scales=part.scales.to(torch.float16),
            zeros=None if scheme.symmetric else part.zeros.to(torch.uint8),
            g_idx=g_idx,
            bits=scheme.bits,
            group_size=scheme.group_size,
        )
        energy = float(part.energy.sum())
        found.append(Rounded(linear, float(part.error.sum()) / energy if energy else 0.0))
    return found


@dataclass(frozen=True, slots=True)
class _Rows:
    q: Tensor  # [n, K] uint8, columns as they stand in the model
    scales: Tensor  # [n, G] float32
    zeros: Tensor  # [n, G] float32
    error: Tensor  # [n] e H' e^T
    energy: Tensor  # [n] w H' w^T


def _fields(rows: _Rows) -> tuple[Tensor, ...]:
    return rows.q, rows.scales, rows.zeros, rows.error, rows.energy


def _round_rows(
    weight: Tensor,
    curvature: Curvature,
    scheme: Scheme,
    rounding: Rounding,
    refine: int,
    lowest_zero: int,
    ranges: Sequence[float],
) -> _Rows:
    placed = weight.detach().to(torch.float32).t()[curvature.columns]  # [K, n] in places
    groups = _groups(curvature, scheme)
    grid = search_grid(placed, curvature.activity, scheme, groups, lowest_zero=lowest_zero, ranges=ranges)
    if rounding == "nearest":
        q = nearest(placed, grid.scales[groups], grid.zeros[groups], grid.top)
        error, energy = None, output_energy(placed, curvature.factor)
    else:
        q, error = round_with_feedback(placed, curvature.factor, grid)
        if refine:
            weight_gram = product(curvature.gram, placed)  # [K, n]
            energy = (weight_gram * placed).sum(0)
        else:
            energy = output_energy(placed, curvature.factor)
        for _ in range(refine):
            grid = least_squares_scales(weight_gram, q, curvature.gram, grid)
            q = descend(placed, q, curvature.gram, grid)
            error = None
    if error is None:
        error = output_energy(grid.dequantize(q).sub_(placed), curvature.factor)
    in_model = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    in_model[:, curvature.columns] = q.t().to(torch.uint8)
    return _Rows(
        in_model,
        grid.scales.t().contiguous(),
        grid.zeros.t().contiguous(),
        error,
        energy,
    )


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
