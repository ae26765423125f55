"""float64 to a narrower float, rounded once."""

from __future__ import annotations

import torch
from torch import Tensor


def round_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """values (float64) to the nearest of `dtype`, ties to even.

    PyTorch goes by way of float32 to bfloat16 and float16, which rounds twice: a value a little beside a
    tie lands on it. Rounded to odd on the way (towards zero, the last bit set where anything was cut off),
    float32 keeps which side it was on. Source: Boldo and Melquiond 2008, Emulation of FMA.
    """
    if dtype in (torch.float64, torch.float32):
        return values.to(dtype)
    near = values.to(torch.float32)
    back = near.to(torch.float64)
    bits = near.view(torch.int32)
    bits = bits - (back.abs() > values.abs()).to(torch.int32)  # towards zero; magnitudes lie in order
    bits |= (back != values).to(torch.int32)
    return bits.view(torch.float32).to(dtype)
