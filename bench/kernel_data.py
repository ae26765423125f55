"""Inputs of a case, from a seed: the same tensors for every variant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qtrain.kernels import NF4Weight

from .kernel_shapes import Case

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SCALING = 2.0  # alpha / r of the recipes' alpha = 2 r


@dataclass(frozen=True)
class Quantised:
    """A weight as bitsandbytes holds it, and our view of the same memory."""

    packed: Tensor
    state: Any  # bitsandbytes.functional.QuantState
    view: NF4Weight


@dataclass(frozen=True)
class LoraData:
    """x [M, K], and per layer W [N, K], A [r, K], B [N, r] (float32), dy [M, N]."""

    x: Tensor
    weights: list[Tensor | Quantised]
    lora_As: list[Tensor]
    lora_Bs: list[Tensor]
    dys: list[Tensor]
    scaling: float = SCALING


@dataclass(frozen=True)
class HeadData:
    """hidden [M, H], weight [V, H], labels [M], grad [M] (float32)."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    grad: Tensor


Data = LoraData | HeadData


def make_data(case: Case, device: torch.device, seed: int) -> Data:
    """Random inputs whose outputs are of order 1, the low-rank term as large as the base's.

    Raises:
        torch.OutOfMemoryError: they do not fit.
    """
    generator = torch.Generator(device).manual_seed(seed)
    dtype = TORCH_DTYPES[case.dtype]
    m, k, r = case.rows, case.inner, case.rank

    def normal(*shape: int, scale: float = 1.0, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device=device).normal_(0, scale, generator=generator)

    if case.op == "linear_logprob":
        (vocabulary,) = case.columns
        weight = normal(vocabulary, k, scale=2 / k**0.5)  # logits of standard deviation 2
        labels = torch.randint(vocabulary, (m,), generator=generator, device=device)
        grad = torch.empty(m, device=device).uniform_(0.5, 1.5, generator=generator)
        return HeadData(normal(m, k).requires_grad_(), weight, labels, grad)
    dense = [normal(n, k, scale=k**-0.5) for n in case.columns]
    return LoraData(
        x=normal(m, k).requires_grad_(),
        weights=[quantise(weight) for weight in dense] if case.base == "nf4" else list(dense),
        lora_As=[normal(r, k, scale=k**-0.5, of=torch.float32).requires_grad_() for _ in dense],
        lora_Bs=[
            normal(n, r, scale=r**-0.5 / SCALING, of=torch.float32).requires_grad_() for n in case.columns
        ],
        dys=[normal(m, n) for n in case.columns],
    )


def quantise(dense: Tensor) -> Quantised:
    """NF4 in blocks of 64 with nested absmax, as QLoRA's recipes have it."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(dense, blocksize=64, compress_statistics=True, quant_type="nf4")
    return Quantised(packed, state, NF4Weight.from_quant_state(packed, state))
