"""Where channel scales go: x / t has to come from what stands before the linear layers that take W diag(t).

A norm's weight, a bias and the scales of an already quantised weight's rows are divided by t. What is stored
is rounded first and t taken from what was stored, so that the model does the same as before, exactly: only
the float16 scales of quantised rows are rounded once more (2^-12 of a weight, beside 2^-4 of its rounding).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..formats.quantized import QuantizedLinear
from ..rounding.grid import storable
from ..structure import Link

CLOSE = 2.0**-7  # of a scale: what rounding to bfloat16 may change


def fold_vector(values: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """values / t and the t, near `scales`, for which that is exact; [C] float32 both.

    The quotients are held by bfloat16 and by float16, whichever a reader computes in. A value whose quotient
    neither can hold keeps what it was, with t = 1; a value of zero allows every t.

    Args:
        values: [C], as the checkpoint has them.
        scales: [C], positive.
    """
    values = values.to(torch.float32)
    folded = (values / scales).to(torch.bfloat16).to(torch.float16).to(torch.float32)
    exact = values / folded
    held = torch.isfinite(folded) & ((exact / scales - 1).abs() <= CLOSE)
    zero = values == 0
    return torch.where(held, folded, values), torch.where(zero, scales, torch.where(held, exact, 1.0))


def fold_rows(linear: QuantizedLinear, scales: Tensor) -> QuantizedLinear:
    """Rows divided by t, [N]: the integers stay, their scales change."""
    divided = linear.scales.to(torch.float32) / scales[:, None]
    return replace(linear, scales=storable(divided).to(torch.float16))


def foldable_rows(linear: QuantizedLinear, scales: Tensor) -> Tensor:
    """t within what the rows' float16 scales can take without losing digits, [N]."""
    sizes = linear.scales.to(torch.float32).abs()
    half = torch.finfo(torch.float16)
    most = (sizes.amin(1) / half.smallest_normal).clamp(min=1.0)
    least = sizes.amax(1) / half.max
    return torch.minimum(torch.maximum(scales, least), most)


def channels_of(link: Link, width: int, device: torch.device) -> Tensor:
    """[K] the output channel of `link.before` that is behind each input of `link.after`.

    Heads are repeated one by one: input head h comes from head h // repeats.
    """
    column = torch.arange(width, device=device)
    head = column.div(link.head_dim * link.repeats, rounding_mode="floor")
    return head * link.head_dim + column % link.head_dim
