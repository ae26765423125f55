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
    """H = sum over tokens of x^T x, and where asked D = sum of (y - x)^T x and E = sum of (s - r)^T x.

    y and s are the same tokens' x and r in another model; r is what the layer's output is added to.

    Args:
        width: K.
        drift: keep D as well.
        outputs: N, to keep E as well.

    Attributes:
        gram: [K, K] float32; whole after `finish`.
        drift: D, [K, K] float32, or None.
        residual_drift: E, [N, K] float32, or None.
        tokens: rows added so far.
    """

    def __init__(
        self, width: int, *, drift: bool = False, outputs: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        self.gram = torch.zeros(width, width, device=device)
        self.drift = torch.zeros(width, width, device=device) if drift else None
        self.residual_drift = torch.zeros(outputs, width, device=device) if outputs else None
        self.tokens = 0

    def add(self, inputs: Tensor, reference: Tensor | None = None, behind: Tensor | None = None) -> None:
        """Add tokens. Inputs of 16 bits are multiplied in bfloat16 for D and E: these are small beside H, and
        are needed with few digits.

        Args:
            inputs: x, [.., K], any float dtype.
            reference: y, of the same shape; needed where D is kept.
            behind: s - r, [.., N]; needed where E is kept.
        """
        x = _tokens(inputs)
        y = None if reference is None else _tokens(reference)
        lag = None if behind is None else _tokens(behind)
        for first in range(0, x.shape[0], TOKENS):
            part = slice(first, first + TOKENS)
            across = x[part].t().to(torch.float32, memory_format=torch.contiguous_format)  # [K, T]
            for rows in _strips(x.shape[1], x.shape[1], BLOCKS):
                self.gram[rows, rows.start :] += product_with(across[rows], across[rows.start :])  # above
            if self.drift is not None:
                _accumulate(self.drift, _given(y, "reference")[part] - x[part], x[part], across)
            if self.residual_drift is not None:
                _accumulate(self.residual_drift, _given(lag, "behind")[part], x[part], across)
        self.tokens += x.shape[0]

    def take_drift(self) -> tuple[Tensor, Tensor | None]:
        """D, and E if it was kept; they are not kept any longer.

        Raises:
            ValueError: there is no D.
        """
        if self.drift is None:
            raise ValueError("the drift is missing: this sum was not told to keep it")
        found = self.drift, self.residual_drift
        self.drift = self.residual_drift = None
        return found

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


def _tokens(values: Tensor) -> Tensor:
    return values.detach().reshape(-1, values.shape[-1])


def _given(values: Tensor | None, name: str) -> Tensor:
    if values is None:
        raise ValueError(f"{name} is missing: this sum keeps what it moved by")
    return values


def _accumulate(into: Tensor, moved: Tensor, x: Tensor, across: Tensor) -> None:
    """Add moved^T x; `across` is x^T in float32."""
    exact = x.dtype == torch.float32
    left = moved.t().contiguous() if exact else moved.to(torch.bfloat16).t()
    right = across if exact else x.to(torch.bfloat16)
    for rows in _strips(into.shape[0], into.shape[1], 1):
        into[rows] += product_with(left[rows], right) if exact else left[rows] @ right


def _strips(rows: int, width: int, blocks: int) -> Iterator[slice]:
    step = rows if width <= SMALL else min(-(-rows // blocks), max(1, AT_ONCE // width))
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))
