"""The correctness gate of the quantizers' benchmark: what was asked for was written, and is still a model."""

from __future__ import annotations

import math

from .quantizer_read import QuantizedFolder, Sizes
from .quantizer_score import Score

# Rounding to nearest loses about 0.4 nats; a model that answers by chance, 5 or more: a checkpoint above this
# is packed wrongly or was read wrongly, and how long it took to make says nothing.
KL_BOUND = 2.0


def check_scheme(folder: QuantizedFolder, sizes: Sizes, *, group_size: int, symmetric: bool) -> str | None:
    """Why a folder can't be compared with those of its kind, in one line, or None."""
    scheme = folder.scheme
    if scheme.bits != 4 or scheme.group_size != group_size:
        return f"has {scheme.bits} bits in groups of {scheme.group_size}, not 4 in groups of {group_size}"
    if scheme.desc_act:
        return "groups columns in an order of its own (desc_act), which not every reader serves"
    if symmetric and not scheme.symmetric:
        return "has zero points, though symmetric was asked for"
    if sizes.quantized_share < 1:
        return f"only {sizes.quantized_share:.0%} of the decoder layers' weights are quantised"
    return None


def check_score(score: Score) -> str | None:
    """Why a folder's predictions are not to be trusted, in one line, or None."""
    mean = sum(score.kl) / len(score.kl)
    if not math.isfinite(mean) or mean > KL_BOUND:
        return f"KL is {mean:.3g}, above {KL_BOUND}: no working model"
    return None
