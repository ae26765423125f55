"""Small integers side by side in int32 words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .scheme import WORD


def pack_columns(values: Tensor, bits: int, order: Sequence[int] | None = None) -> Tensor:
    """word[r, c] = sum_i values[r, per c + order[i]] << (bits i), with per = 32 / bits

    values: [R, C] uint8 below 2^bits, C a multiple of `per`. Returns [R, C / per] int32. `order` is
    0 .. per-1, lowest bits first, unless given.
    """
    per = WORD // bits
    rows, columns = values.shape
    if columns % per:
        raise ValueError(f"{columns} columns of {bits} bits do not fill whole {WORD}-bit words")
    words = torch.zeros((rows, columns // per), dtype=torch.int32, device=values.device)
    for place, column in enumerate(order or range(per)):
        words |= values[:, column::per].to(torch.int32) << (bits * place)
    return words


def unpack_columns(words: Tensor, bits: int, order: Sequence[int] | None = None) -> Tensor:
    """The inverse: [R, W] int32 -> [R, W * 32 / bits] uint8."""
    if words.dtype != torch.int32:
        raise ValueError(f"packed words are {words.dtype}, must be torch.int32")
    per = WORD // bits
    values = torch.empty((words.shape[0], words.shape[1] * per), dtype=torch.uint8, device=words.device)
    for place, column in enumerate(order or range(per)):
        values[:, column::per] = (words >> (bits * place)) & ((1 << bits) - 1)
    return values
