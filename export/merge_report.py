"""What merging changed: the model with its adapter on, against base and adapter in one set of weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .agreement import Agreement, agreement
from .checkpoint import Checkpoint
from .merged_weights import BaseWeights, MergedWeights
from .nf4_base import NF4Settings
from .streamed_model import Fetch, StreamedModel

Say = Callable[[str], None]


def merge_report(
    weights: MergedWeights,
    written: Path,
    windows: Sequence[Sequence[int]],
    *,
    trained_on: NF4Settings | None,
    compute_dtype: torch.dtype,
    device: torch.device | str = "cpu",
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """KL(adapter on || merged), top-1 agreement and logit differences on token windows, for both bases.

    The adapter is on as it was in training: over the NF4 weights of a 4-bit run, or the stored ones. All
    arithmetic is float32, so that what differs is the weights. The base that was written is read back from
    its files; the other is computed on the way.

    Args:
        weights: that were written.
        written: the folder they were written to.
        windows: token ids, held out from training.
        trained_on: how the run held its base in 4 bits; None for 16 bits.
        compute_dtype: that the run held the other weights in.
        device: where to compute.
    """
    checkpoint, adapter = weights.checkpoint, weights.adapter
    others: list[BaseWeights] = ["original"] if trained_on is None else ["original", "dequantized"]
    say(f"adapter on, over the {'stored' if trained_on is None else 'NF4'} base")
    trained = MergedWeights(checkpoint, None, base=others[-1], nf4=trained_on, dtype=compute_dtype)
    p = StreamedModel(
        checkpoint.folder, trained.fetch, extra=None if adapter is None else adapter.output, device=device
    )
    p_states = p.hidden_states(windows)
    found: dict[str, Any] = {}
    for base in dict.fromkeys([weights.base, *others]):
        say(f"merged, base {base}")
        if base == weights.base:
            fetch: Fetch = Checkpoint.open(written).mapped
        else:
            fetch = MergedWeights(checkpoint, adapter, base=base, nf4=weights.nf4, dtype=weights.dtype).fetch
        q = StreamedModel(checkpoint.folder, fetch, device=device)
        result: Agreement = agreement(windows, (p_states, p.logits), (q.hidden_states(windows), q.logits))
        found[base] = result.as_dict() | {"written": base == weights.base}
    return {
        "adapter_on": "stored base" if trained_on is None else "NF4 base, as in training",
        "arithmetic": "float32",
        "windows": len(windows),
        "tokens": sum(map(len, windows)),
        "bases": found,
    }
