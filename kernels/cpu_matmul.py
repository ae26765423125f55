"""Products on a CPU: float32 ones through oneDNN, where torch has it.

torch sends float32 matmuls to MKL, which on CPUs that are not Intel's runs a fifth to a third slower than the
oneDNN that comes with torch as well (docs/lab-log.md). bf16 goes to oneDNN by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 1 << 22  # multiplications below which the call costs more than it saves


def product_with(a: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """a w^T + bias, [M, N], for a [M, K] and w [N, K] of one dtype; no autograd."""
    if _onednn_serves(a, w):
        return torch.ops.mkldnn._linear_pointwise.default(a, w, bias, "none", [], "")
    return torch.nn.functional.linear(a, w, bias)


def _onednn_serves(a: Tensor, w: Tensor) -> bool:
    return (
        a.dtype == w.dtype == torch.float32
        and a.is_cpu
        and a.is_contiguous()
        and a.numel() * w.shape[0] >= SMALLEST
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and bool(torch.backends.mkldnn.enabled)
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
