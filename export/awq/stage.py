"""A stage's channel scales: chosen for all its weights together, and folded into what stands before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..formats.scheme import Scheme
from ..rounding.curvature import Curvature
from ..rounding.linear import Rounded, Rounding
from ..structure import Link, Stage, linear
from .fold import channels_of, fold_rows, fold_vector, foldable_rows
from .nearest import least_error
from .scales import Part, channel_scales

Stored = Callable[[str], Tensor]  # a parameter of the layer by its name, as the checkpoint has it


@dataclass(frozen=True, slots=True)
class Folded:
    """Scales and what their folding changes; names are within the layer.

    Attributes:
        scales: t, [K] float32.
        changed: parameters with new values.
        rounded: the module before, with new scales.
    """

    scales: Tensor
    changed: dict[str, Tensor] = field(default_factory=dict)
    rounded: dict[str, Rounded] = field(default_factory=dict)


def why_not(
    stage: Stage,
    links: Sequence[Link],
    schemes: Mapping[str, Scheme | None],
    earlier: Mapping[str, Rounded],
) -> str | None:
    """The reason for which a stage's inputs can't be scaled; None where they can."""
    in_16_bits = [name for name in stage.linears if schemes[name] is None]
    if in_16_bits:
        return f"not scaled: {in_16_bits[0]} reads the same inputs and stays in 16 bits"
    if stage.norm is not None:
        return None
    link = link_to(stage, links)
    if link is None:
        return "not scaled: nothing before it takes the inverse"
    if link.before not in earlier:
        return f"not scaled: {link.before} stays in 16 bits"
    return None


def fold_scales(
    layer: nn.Module,
    stage: Stage,
    links: Sequence[Link],
    weights: Mapping[str, Tensor],
    found: Curvature,
    schemes: Mapping[str, Scheme],
    rounding: Rounding,
    ranges: Sequence[float],
    earlier: Mapping[str, Rounded],
    stored: Stored,
) -> Folded:
    """Choose t for a stage that `why_not` has nothing against, and fold it.

    Args:
        weights: [N, K] of each module of the stage, not scaled.
        found: of the inputs, not scaled.
        ranges: that the grids' scales are searched among.
        earlier: the layer's modules that are quantised already.
        stored: gives the norm and the bias.
    """
    link = None if stage.norm is not None else link_to(stage, links)
    width, device = found.columns.numel(), found.columns.device
    channels = torch.arange(width, device=device) if link is None else channels_of(link, width, device)
    wanted = _choose(weights, found, schemes, rounding, ranges, channels)
    if stage.norm is not None:
        name = f"{stage.norm}.weight"
        folded, scales = fold_vector(stored(name).to(device), wanted)
        return Folded(scales, {name: folded})
    if link is None:
        raise ValueError(f"{stage.linears[0]}: nothing before it takes the inverse of its scales")
    before = earlier[link.before]
    rows = foldable_rows(before.linear, wanted)
    changed: dict[str, Tensor] = {}
    if linear(layer, link.before).bias is not None:
        bias = f"{link.before}.bias"
        changed[bias], rows = fold_vector(stored(bias).to(device), rows)
    rounded = {link.before: replace(before, linear=fold_rows(before.linear, rows))}
    return Folded(rows[channels], changed, rounded)


def _choose(
    weights: Mapping[str, Tensor],
    found: Curvature,
    schemes: Mapping[str, Scheme],
    rounding: Rounding,
    ranges: Sequence[float],
    channels: Tensor,
) -> Tensor:
    """t of each channel, [C]."""
    parts = [
        Part(its, column_groups(found, schemes[name]), schemes[name].symmetric, schemes[name].top)
        for name, its in weights.items()
    ]
    squares = by_column(found, found.gram.diagonal())
    if rounding == "gptq":
        return channel_scales(parts, by_column(found, found.importance), squares.sqrt(), channels)[0]
    candidates = channel_scales(parts, squares, squares.sqrt(), channels)
    return least_error(candidates, weights, schemes, found, ranges, channels)


def link_to(stage: Stage, links: Sequence[Link]) -> Link | None:
    """The link that ends at a stage's only module."""
    return next((link for link in links if (link.after,) == stage.linears), None)


def scaled(found: Curvature, scales: Tensor) -> Curvature:
    """The curvature of x / t: H'[k, l] / (t[k] t[l]) and R[k, l] / t[l]; in `found`'s memory."""
    placed = scales[found.columns]
    found.gram.div_(placed).div_(placed[:, None])
    found.factor.div_(placed)
    return found


def by_column(found: Curvature, by_place: Tensor) -> Tensor:
    """[K] values by place -> by column."""
    values = torch.empty_like(by_place)
    values[found.columns] = by_place
    return values


def column_groups(found: Curvature, scheme: Scheme) -> Tensor:
    """[K] the group of each column, as rounding forms them."""
    width = found.columns.numel()
    length = scheme.group_length(width)
    places = torch.arange(width, device=found.columns.device)
    if scheme.desc_act:
        return by_column(found, (width - 1 - places).div(length, rounding_mode="floor"))
    return places.div(length, rounding_mode="floor")
