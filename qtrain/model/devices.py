"""Which device and which compute dtype, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qtrain.errors import UserError
from qtrain.kernels.native_bf16 import multiplies_bf16
from qtrain.recipe.schema import ModelSettings


@dataclass(frozen=True, slots=True)
class Compute:
    """Device and dtype of matmuls and activations, with the reason to print."""

    device: torch.device
    dtype: torch.dtype
    reason: str


_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_compute(settings: ModelSettings, local_rank: int = 0) -> Compute:
    """CUDA where there is one; bf16 where the device multiplies in it, else fp16 (CUDA) or fp32 (CPU).

    Raises:
        UserError: fp16 on a CPU, whose fp16 gradients underflow without a loss scaler.
    """
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        best, why = (
            (torch.bfloat16, "this GPU multiplies in bf16")
            if multiplies_bf16(device)
            else (torch.float16, "no bf16 before Ampere")
        )
    else:
        device = torch.device("cpu")
        best, why = (
            (torch.bfloat16, "this CPU multiplies in bf16 (avx512_bf16 or amx)")
            if multiplies_bf16(device)
            else (torch.float32, "this CPU has no bf16 matmul")
        )
    if settings.compute_dtype == "auto":
        return Compute(device, best, why)
    if settings.compute_dtype == "fp16" and device.type == "cpu":
        raise UserError("model.compute_dtype is fp16, which a CPU can't train in; use auto, bf16 or fp32")
    return Compute(device, _DTYPES[settings.compute_dtype], "asked for")
