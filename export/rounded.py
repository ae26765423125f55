"""float64 to a narrower float, rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

_CUT = {torch.bfloat16: 16, torch.float16: 13}  # bits of float32's fraction that the narrow one has not


def round_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """values (float64) to the nearest of `dtype`, ties to even.

    PyTorch goes by way of float32 to bfloat16 and float16, which rounds twice: a value a little beside a
    tie lands on it. Where float32 has such a tie, it is rounded to odd instead (towards zero, the last bit
    set where anything was cut off), which keeps the side. Source: Boldo and Melquiond 2008, Emulation of FMA.
    """
    if dtype not in _CUT:
        return values.to(dtype)
    near = values.to(torch.float32)
    cut = _CUT[dtype]
    tied = (near.view(torch.int32) & ((1 << cut) - 1)) == 1 << (cut - 1)
    if dtype == torch.float16:
        tied |= near.abs() < 2.0**-14  # fewer bits than that are left of float16's least numbers
    rounded = near.to(dtype)
    places = tied.view(-1).nonzero().squeeze(1)
    if places.numel():
        rounded.view(-1)[places] = _to_odd(values.reshape(-1)[places]).to(dtype)
    return rounded


def _to_odd(values: Tensor) -> Tensor:
    """float64 to float32: towards zero, with the last bit set where anything was cut off."""
    near = values.to(torch.float32)
    back = near.to(torch.float64)
    bits = near.view(torch.int32)
    bits = bits - (back.abs() > values.abs()).to(torch.int32)  # magnitudes lie in order
    bits |= (back != values).to(torch.int32)
    return bits.view(torch.float32)
