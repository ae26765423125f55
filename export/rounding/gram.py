"""Sums over a linear layer's inputs, taken while they stream by."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCKS = 4  # of columns: a symmetric product in blocks costs (BLOCKS + 1) / (2 BLOCKS) of the full one
SMALL = 512  # columns below which one product is faster


class GramSum:
    """H = sum over tokens of x^T x, and C = sum of y^T x with y the same tokens' inputs in another model.

    Args:
        width: K.
        cross: keep C as well.

    Attributes:
        gram: [K, K] float32; whole after `finish`.
        cross: [K, K] float32 or None.
        tokens: rows added so far.
    """

    def __init__(self, width: int, *, cross: bool = False, device: torch.device | str = "cpu") -> None:
        self.gram = torch.zeros(width, width, device=device)
        self.cross = torch.zeros(width, width, device=device) if cross else None
        self.tokens = 0

    def add(self, inputs: Tensor, reference: Tensor | None = None) -> None:
        """Add tokens.

        Args:
            inputs: x, [.., K], any float dtype.
            reference: y, of the same shape; needed where `cross` is kept.
        """
        x = inputs.detach().reshape(-1, inputs.shape[-1]).to(torch.float32)  # [T, K]
        width = x.shape[1]
        step = width if width <= SMALL else -(-width // BLOCKS)
        for first in range(0, width, step):
            rows = slice(first, min(first + step, width))
            self.gram[rows, first:].addmm_(x[:, rows].t(), x[:, first:])  # the upper blocks only
        if self.cross is not None:
            if reference is None:
                raise ValueError("reference is missing: this sum keeps the cross term")
            self.cross.addmm_(reference.detach().reshape(-1, width).to(torch.float32).t(), x)
        self.tokens += x.shape[0]

    def take_cross(self) -> Tensor:
        """C, which is not kept any longer.

        Raises:
            ValueError: there is none.
        """
        if self.cross is None:
            raise ValueError("the cross term is missing: this sum was not told to keep it")
        cross, self.cross = self.cross, None
        return cross

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
