"""What quantising layer by layer will take, from shapes alone: peak memory and products."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .layerwise import Compute, bytes_per_token, kept_per_token
from .quantize_stage import StageSettings
from .rounding.linear import AT_ONCE
from .structure import Stage, Structure, linear

COPIES = 12  # of a slice of a weight in float32 while it is rounded and refined: counted, about
LIBRARIES = 300 * 2**20  # what torch and transformers take besides


@dataclass(frozen=True, slots=True)
class PlannedCost:
    """Of an export's decoder layers.

    Attributes:
        peak_bytes: resident at most, above torch's import; the same for every number of layers.
        forward: multiplications and additions of matrix products in the forward's dtype, the drift's too.
        exact: those in float32: sums over inputs, factors, rounding.
    """

    peak_bytes: int
    forward: float
    exact: float


def planned_cost(
    structure: Structure, windows: int, length: int, settings: StageSettings, compute: Compute
) -> PlannedCost:
    """Memory and arithmetic for `windows` calibration windows of `length` tokens."""
    layer = structure.layer(0)
    tokens = windows * length
    models = 2 if settings.correction else 1
    weights = sum(parameter.numel() for parameter in layer.parameters())
    at_once = min(windows, compute.windows_at_once(structure, length))
    kept = tokens * kept_per_token(structure, compute.dtype, models)
    if compute.spills(structure, tokens, models):
        kept = kept * at_once // windows  # the others lie in files
    activations = at_once * length * bytes_per_token(structure, compute.dtype)
    stages = [_of_stage(layer, stage, settings) for stage in structure.stages]
    held = LIBRARIES + kept + weights * compute.dtype.itemsize
    beside = weights * compute.dtype.itemsize if models == 2 else 0
    peak = max(
        max(
            held + beside + its.summing_bytes + activations,
            held + its.rounding_bytes + (beside if its is not stages[-1] else 0),
        )
        for its in stages
    )
    forward = 2.0 * weights * tokens * models
    squares = sum(float(tokens) * its.width**2 for its in stages)
    drift = 2.0 * tokens * sum(its.drifts for its in stages)
    exact = 1.25 * squares + sum(its.products for its in stages)
    return PlannedCost(peak, structure.count * (forward + drift), structure.count * exact)


@dataclass(frozen=True, slots=True)
class _StageCost:
    width: int
    summing_bytes: int  # H, and where corrected D and E
    drifts: int  # entries of D and E
    rounding_bytes: int
    products: float


def _of_stage(layer: nn.Module, stage: Stage, settings: StageSettings) -> _StageCost:
    modules = [linear(layer, name) for name in stage.linears]
    width = modules[0].in_features
    rows = sum(module.out_features for module in modules)
    slice_bytes = 4 * min(AT_ONCE, rows * width)
    corrected = 4 * rows * width if settings.correction else 0
    drifts = (width + (rows if stage.residual else 0)) * width if settings.correction else 0
    integers = rows * width
    needed = 2 * 4 * width**2 + corrected + integers + COPIES * slice_bytes
    of_weight = float(rows) * width**2
    products = width**3 / 3 + of_weight  # H's factor, and feedback or the error of the nearest
    products += (3 + 3 * settings.refine) * of_weight if settings.refine else of_weight
    if settings.correction:
        products += 4 * of_weight
    return _StageCost(width, 4 * (width**2 + drifts), drifts, needed, products)
