"""Outputs that hold NaN until a kernel writes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor


def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` returns NaN (or the largest integer): what a kernel leaves unwritten shows."""
    plain = torch.empty

    def poisoned(*size: Any, **options: Any) -> Tensor:
        tensor = plain(*size, **options)
        if tensor.is_floating_point():
            return tensor.fill_(torch.nan)
        return tensor.fill_(torch.iinfo(tensor.dtype).max) if tensor.dtype != torch.bool else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
