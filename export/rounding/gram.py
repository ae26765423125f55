"""Sums over a linear layer's inputs, taken while they stream by."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qtrain.kernels.cpu_matmul import product_with

BLOCKS = 4  # of columns: a symmetric product in blocks costs (BLOCKS + 1) / (2 BLOCKS) of the full one
SMALL = 512  # columns below which one product is faster
AT_ONCE = 2**24  # entries of a product
TOKENS = 2048  # in one product: what lies beside the sums stays small


class GramSum:
    """H = sum over tokens of x^T x, and D = sum of (y - x)^T x: y is the same tokens' in another model.

    Args:
        width: K.
        drift: keep D as well.

    Attributes:
        gram: [K, K] float32; whole after `finish`.
        drift: [K, K] float32 or None.
        tokens: rows added so far.
    """

    def __init__(self, width: int, *, drift: bool = False, device: torch.device | str = "cpu") -> None:
        self.gram = torch.zeros(width, width, device=device)
        self.drift = torch.zeros(width, width, device=device) if drift else None
        self.tokens = 0

    def add(self, inputs: Tensor, reference: Tensor | None = None) -> None:
        """Add tokens.

        Args:
            inputs: x, [.., K], any float dtype.
            reference: y, of the same shape; needed where D is kept. Inputs of 16 bits are multiplied in
                bfloat16: D is small beside H, and is needed with few digits.
        """
        width = inputs.shape[-1]
        others = None if reference is None else reference.detach().reshape(-1, width)
        for first in range(0, inputs.numel() // width, TOKENS):
            part = slice(first, first + TOKENS)
            self._add(inputs.detach().reshape(-1, width)[part], None if others is None else others[part])

    def _add(self, x: Tensor, y: Tensor | None) -> None:
        across = x.t().to(torch.float32, memory_format=torch.contiguous_format)  # [K, T]
        for rows in _strips(x.shape[1], BLOCKS):
            self.gram[rows, rows.start :] += product_with(across[rows], across[rows.start :])  # upper blocks
        self.tokens += x.shape[0]
        if self.drift is None:
            return
        if y is None:
            raise ValueError("reference is missing: this sum keeps the drift")
        if x.dtype == torch.float32:
            moved = y.t() - across
            for rows in _strips(x.shape[1], 1):
                self.drift[rows] += product_with(moved[rows], across)
        else:
            short = x.to(torch.bfloat16)
            moved = (y - x).to(torch.bfloat16).t()
            for rows in _strips(x.shape[1], 1):
                self.drift[rows] += moved[rows] @ short

    def take_drift(self) -> Tensor:
        """D, which is not kept any longer.

        Raises:
            ValueError: there is none.
        """
        if self.drift is None:
            raise ValueError("the drift is missing: this sum was not told to keep it")
        drift, self.drift = self.drift, None
        return drift

    def finish(self) -> Tensor:
        """Fill in the lower blocks; returns `gram`."""
        width = self.gram.shape[0]
        step = max(1, -(-width // 16))
        for first in range(0, width, step):
            last = min(first + step, width)
            self.gram[last:, first:last] = self.gram[first:last, last:].t()
            corner = self.gram[first:last, first:last]
            corner.copy_(corner.triu() + corner.triu(1).t())
        return self.gram


def _strips(width: int, blocks: int) -> Iterator[slice]:
    step = width if width <= SMALL else min(-(-width // blocks), max(1, AT_ONCE // width))
    for first in range(0, width, step):
        yield slice(first, min(first + step, width))
