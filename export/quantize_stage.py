"""One stage of a decoder layer: linear modules with one input, scaled and rounded together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from .awq.stage import Stored, fold_scales, scaled, why_not
from .formats.scheme import Scheme
from .layer import put_dequantized
from .rounding.correction import corrected_weight, missing_products
from .rounding.curvature import ActOrder, Curvature, curvature
from .rounding.gram import GramSum
from .rounding.grid import RANGES
from .rounding.linear import Rounded, Rounding, round_linears
from .structure import Link, Stage, linear

Scaling = Literal["none", "awq"]


@dataclass(frozen=True, slots=True)
class StageSettings:
    """How every stage is quantised.

    Attributes:
        rounding: nearest values, or GPTQ's.
        act_order: order of columns in GPTQ's rounding.
        damp: of the Gram matrix, relative to its mean diagonal.
        refine: rounds after GPTQ's.
        lowest_zero: of asymmetric zero points, which is the format's.
        keep_last_states: keep the states behind the last layer, for lm_head.
        scaling: `awq` chooses channel scales (awq/scales.py), folded into the norm or linear module before.
        clip: search how far each group's range is clipped, where rounding is to the nearest.
        correction: strength of the correction for what earlier layers lost (rounding/correction.py), 0 .. 1.
    """

    rounding: Rounding = "gptq"
    act_order: ActOrder = "static"
    damp: float = 0.01
    refine: int = 1
    lowest_zero: int = 0
    keep_last_states: bool = False
    scaling: Scaling = "none"
    clip: bool = False
    correction: float = 0.0

    @property
    def ranges(self) -> tuple[float, ...]:
        """What scales are searched among: feedback makes up for clipping, nearest values only where asked."""
        return RANGES if self.rounding == "gptq" or self.clip else (1.0,)


@dataclass(frozen=True, slots=True)
class StageResult:
    """What became of a stage; names are within the layer.

    Attributes:
        rounded: the quantised modules; a module before as well, where scales were folded into it.
        changed: other parameters of the layer that have new values, float32.
        notes: what a user should know of, by module.
    """

    rounded: dict[str, Rounded] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def quantize_stage(
    layer: nn.Module,
    stage: Stage,
    sums: GramSum,
    schemes: Mapping[str, Scheme | None],
    names: Mapping[str, str],
    settings: StageSettings,
    *,
    links: Sequence[Link],
    earlier: Mapping[str, Rounded],
    stored: Stored,
) -> StageResult:
    """Round a stage's modules and put the dequantised weights into the layer.

    What is in the layer stays as if nothing was scaled, W = What diag(1 / t), and its norms with it: a layer
    that is running has seen the norm's output already. Only what the result holds is folded.

    Args:
        sums: over the stage's inputs; used up.
        schemes: of each module by its name within the layer; None leaves it in 16 bits.
        names: full names by names within the layer, for errors.
        links: of the layer's structure.
        earlier: what the layer's stages before gave.
        stored: gives a parameter of the layer as the checkpoint has it.

    Raises:
        ExportError: names the module.
    """
    result = StageResult()
    alike: dict[Scheme, list[str]] = {}
    for name in stage.linears:
        scheme = schemes[name]
        if scheme is not None:
            alike.setdefault(scheme, []).append(name)
    if not alike:
        return result
    first = stage.linears[0]
    weights: dict[str, Tensor] = {
        name: linear(layer, name).weight.data for members in alike.values() for name in members
    }
    gram = sums.finish()
    missing, missed = _missing(stage, weights, sums) if settings.correction else ({}, [])
    found = curvature(gram, order=settings.act_order, damp=settings.damp, name=names[first])
    notes = _notes(sums, found, settings) + missed
    for name, lacking in missing.items():
        weights[name] = corrected_weight(weights[name], lacking, found, settings.correction)
    reason = why_not(stage, links, schemes, earlier) if settings.scaling == "awq" else ""
    if reason:
        notes.append(reason)
    scales = None
    if reason is None:
        quantised = {name: scheme for scheme, members in alike.items() for name in members}
        folded = fold_scales(
            layer,
            stage,
            links,
            weights,
            found,
            quantised,
            settings.rounding,
            settings.ranges,
            earlier,
            stored,
        )
        scales = folded.scales
        found = scaled(found, scales)
        weights = {name: its.to(torch.float32).mul_(scales) for name, its in weights.items()}
        result.changed.update(folded.changed)
        result.rounded.update(folded.rounded)
    if notes:
        result.notes[first] = "; ".join(notes)
    for scheme, members in alike.items():
        rounded = round_linears(
            [weights.pop(name) for name in members],
            found,
            scheme,
            rounding=settings.rounding,
            refine=settings.refine,
            lowest_zero=settings.lowest_zero,
            ranges=settings.ranges,
            names=[names[name] for name in members],
        )
        for name, its in zip(members, rounded, strict=True):
            result.rounded[name] = its
            put_dequantized(layer, name, its.linear)
            if scales is not None:
                linear(layer, name).weight.div_(scales)
    return result


def _missing(
    stage: Stage, weights: Mapping[str, Tensor], sums: GramSum
) -> tuple[dict[str, Tensor], list[str]]:
    """What the outputs lack, with a note where that is not all."""
    drift, residual_drift = sums.take_drift()
    alone = stage.gives is not None and residual_drift is None
    notes = ["what its output is added to was not found: corrected for its own inputs only"] if alone else []
    return missing_products(weights, drift, residual_drift), notes


def _notes(sums: GramSum, found: Curvature, settings: StageSettings) -> list[str]:
    width = found.columns.numel()
    notes = []
    if sums.tokens < width:
        notes.append(
            f"calibrated on {sums.tokens} tokens for {width} inputs, too few to tell them apart; "
            "give more (--calib)"
        )
    if found.damp > settings.damp:
        notes.append(f"damping {found.damp:g} instead of {settings.damp:g}: not positive definite before")
    if found.dead:
        notes.append(
            f"{found.dead} of {width} inputs were always zero: their weights are rounded to the nearest"
        )
    return notes
