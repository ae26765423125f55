"""Sums over a linear layer's inputs, taken while they stream by."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCKS = 4  # of columns: a symmetric product in blocks costs (BLOCKS + 1) / (2 BLOCKS) of the full one
SMALL = 512  # columns below which one product is faster


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
        x = inputs.detach().reshape(-1, inputs.shape[-1]).to(torch.float32)  # [T, K]
        width = x.shape[1]
        step = width if width <= SMALL else -(-width // BLOCKS)
        for first in range(0, width, step):
            rows = slice(first, min(first + step, width))
            self.gram[rows, first:].addmm_(x[:, rows].t(), x[:, first:])  # the upper blocks only
        if self.drift is not None:
            if reference is None:
                raise ValueError("reference is missing: this sum keeps the drift")
            exact = inputs.dtype == torch.float32
            moved = reference.detach().reshape(-1, width).to(torch.float32) - x
            moved, x = (moved, x) if exact else (moved.to(torch.bfloat16), x.to(torch.bfloat16))
            for first in range(0, width, step):
                rows = slice(first, min(first + step, width))
                if exact:
                    self.drift[rows].addmm_(moved[:, rows].t(), x)
                else:
                    self.drift[rows] += moved[:, rows].t() @ x
        self.tokens += x.shape[0]

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
