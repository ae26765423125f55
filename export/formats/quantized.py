"""A quantised linear layer as numbers, before any format."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .scheme import Scheme


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """W[n, k] = scales[n, g[k]] (q[n, k] - zeros[n, g[k]])

    Attributes:
        q: [N, K] uint8, 0 .. 2^bits - 1.
        scales: [N, G] float16, the dtype that the formats store.
        zeros: [N, G] uint8, 0 .. 2^bits - 1; None where symmetric: 2^(bits-1).
        g_idx: [K] int32, the group of each column; None where it is k // group_size.
        bits: 2, 4 or 8.
        group_size: columns of a group; -1 for the whole row.

    Raises:
        ValueError: shapes, dtypes or values that do not go together.
    """

    q: Tensor
    scales: Tensor
    zeros: Tensor | None
    g_idx: Tensor | None
    bits: int
    group_size: int

    def __post_init__(self) -> None:
        n, k = self.q.shape
        groups = self.scheme.groups(k)
        if k % self.scheme.group_length(k):
            raise ValueError(f"group_size is {self.group_size}, which does not divide K = {k}")
        _expect("q", self.q, torch.uint8, (n, k))
        _expect("scales", self.scales, torch.float16, (n, groups))
        _at_most("q", self.q, self.scheme.top)
        if self.zeros is not None:
            _expect("zeros", self.zeros, torch.uint8, (n, groups))
            _at_most("zeros", self.zeros, self.scheme.top)
        if self.g_idx is not None:
            _expect("g_idx", self.g_idx, torch.int32, (k,))
            if not bool(((self.g_idx >= 0) & (self.g_idx < groups)).all()):
                raise ValueError(f"g_idx holds values outside of 0 .. {groups - 1}")
        if not bool(torch.isfinite(self.scales).all()):
            raise ValueError("scales hold inf or NaN: a group's range is beyond float16")

    @property
    def scheme(self) -> Scheme:
        """Its bits, group size, symmetry and order."""
        return Scheme(self.bits, self.group_size, self.zeros is None, self.g_idx is not None)

    def groups_of_columns(self) -> Tensor:
        """[K] int32: g_idx, made where it is trivial."""
        if self.g_idx is not None:
            return self.g_idx
        k = self.q.shape[1]
        length = self.scheme.group_length(k)
        return torch.arange(k, dtype=torch.int32, device=self.q.device).div_(length, rounding_mode="floor")

    def zero_points(self) -> Tensor:
        """[N, G] uint8: zeros, made where they are all the middle."""
        if self.zeros is not None:
            return self.zeros
        return torch.full_like(self.scales, self.scheme.middle, dtype=torch.uint8)

    def rows(self, first: int, last: int) -> QuantizedLinear:
        """Rows first .. last - 1 of W, as views."""
        part = slice(first, last)
        zeros = None if self.zeros is None else self.zeros[part]
        return QuantizedLinear(self.q[part], self.scales[part], zeros, self.g_idx, self.bits, self.group_size)

    def dequantize(self) -> Tensor:
        """W, [N, K] float32: exact, as an fp16 scale times a small integer has 24 bits or fewer."""
        groups = self.groups_of_columns().long()
        offset = self.q.to(torch.float32) - self.zero_points().to(torch.float32)[:, groups]
        return offset.mul_(self.scales.to(torch.float32)[:, groups])


def _expect(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, must be {shape} {dtype}")


def _at_most(name: str, tensor: Tensor, top: int) -> None:
    if tensor.numel() and int(tensor.max()) > top:
        raise ValueError(f"{name} holds {int(tensor.max())}, must be 0 .. {top}")
