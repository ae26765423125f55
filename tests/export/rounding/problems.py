"""Layers to round: weights and correlated inputs."""

from __future__ import annotations

import torch
from torch import Tensor


def inputs(tokens: int, width: int, seed: int = 0) -> Tensor:
    """[T, K] float32: correlated, with a few channels that are much larger, as in language models."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    x = torch.randn(tokens, width, generator=generator) @ mixing
    x[:, :: max(1, width // 4)] *= 8
    return x


def weight(rows: int, width: int, seed: int = 1) -> Tensor:
    """[N, K] float32."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) / width**0.5


def gram(x: Tensor) -> Tensor:
    """[K, K]."""
    return x.t() @ x


def output_error(w: Tensor, what: Tensor, x: Tensor) -> float:
    """|x (what - w)^T|^2 in float64."""
    return float((x.double() @ (what.double() - w.double()).t()).square().sum())
