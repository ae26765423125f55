"""The output head, quantised on the states behind the last decoder layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .containers import HEAD
from .formats.quantized import QuantizedLinear
from .formats.scheme import Scheme
from .journal import Journal
from .layer import empty, fill
from .layerwise import Compute
from .merged_weights import MergedWeights
from .quantize_stage import StageSettings
from .rounding.curvature import curvature
from .rounding.gram import GramSum
from .rounding.linear import round_linear
from .structure import Structure

ENTRY = HEAD  # of the journal


def quantize_head(
    structure: Structure,
    source: MergedWeights,
    scheme: Scheme,
    settings: StageSettings,
    pack: Callable[[QuantizedLinear, str], dict[str, Tensor]],
    journal: Journal,
    compute: Compute,
) -> float:
    """Round `lm_head` on norm(states) into the journal's entry `lm_head`; returns its relative error.

    The states are the journal's `states-<layers>`, which `StageSettings.keep_last_states` keeps.

    Raises:
        ExportError: the head's weight or inputs are no numbers.
    """
    entry = f"states-{structure.count}"
    if ENTRY in journal:
        journal.drop(entry)
        return float(journal.notes(ENTRY)["errors"][HEAD])
    name = _last_norm(structure)
    norm = structure.model.get_submodule(name)
    fill(norm, name, source, dtype=compute.dtype, device=compute.device)
    sums = GramSum(structure.model.config.hidden_size, device=compute.device)
    with torch.inference_mode():
        for part in sorted(journal.specs(entry)):
            sums.add(norm(journal.tensor(entry, part).to(compute.device, compute.dtype)))
    empty(norm)
    order = "static" if settings.act_order == "full" and not scheme.desc_act else settings.act_order
    found = curvature(sums.finish(), order=order, damp=settings.damp, name=HEAD)
    rounded = round_linear(
        source.tensor(f"{HEAD}.weight").to(compute.device),
        found,
        scheme,
        rounding=settings.rounding,
        refine=settings.refine,
        lowest_zero=settings.lowest_zero,
        names=[HEAD],
    )
    packed = {f"{HEAD}.{suffix}": values.cpu() for suffix, values in pack(rounded.linear, HEAD).items()}
    journal.save(ENTRY, packed, {"errors": {HEAD: rounded.error}})
    journal.drop(entry)
    return rounded.error


def _last_norm(structure: Structure) -> str:
    """The norm behind the decoder layers: a child beside them that has parameters and is no embedding."""
    parent = structure.layers.rpartition(".")[0]
    names = [
        f"{parent}.{name}"
        for name, module in structure.model.get_submodule(parent).named_children()
        if list(module.parameters(recurse=False)) and not isinstance(module, torch.nn.Embedding)
    ]
    return names[-1]
