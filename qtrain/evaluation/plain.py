"""NF4 weights, dequantised once for decoding.

A decoding step reads every weight for a handful of tokens, and on a CPU bitsandbytes dequantises
the whole matrix each time. Where memory allows, each `Linear4bit` becomes a plain linear with the
weights that its forward would have computed: bit-equal, and many times faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

MEMORY_SHARE = 0.6  # of the free memory; the rest is for the KV cache and activations


def dequantize_for_decoding(model: nn.Module, dtype: torch.dtype, say: Callable[[str], None]) -> bool:
    """Replace every `Linear4bit` by a linear of `dtype` if they fit; says which and why. Returns whether."""
    from bitsandbytes.nn import Linear4bit

    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    if not layers:
        return False
    needed = sum(module.in_features * module.out_features for module in layers.values()) * dtype.itemsize
    device = next(iter(layers.values())).weight.device
    free = free_memory(device)
    sizes = f"{needed / 2**20:.0f} MiB, {free / 2**20:.0f} MiB of memory are free"
    if needed > free * MEMORY_SHARE:
        say(f"decoding over 4-bit weights, dequantised at every step: dequantised they need {sizes}")
        return False
    for name, module in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain_linear(module, dtype))
    say(f"decoding: NF4 weights dequantised once, bit-equal ({sizes})")
    return True


def plain_linear(module: Any, dtype: torch.dtype) -> nn.Linear:
    """The linear layer that a `Linear4bit` computes in `dtype`: y = x dequantize(W)^T + b."""
    from bitsandbytes.functional import dequantize_4bit

    state = module.weight.quant_state
    weight = dequantize_4bit(module.weight.data, state).to(dtype)  # [N, K]
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        linear.bias = nn.Parameter(module.bias.data.to(dtype), requires_grad=False)
    return linear


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated: of the CUDA device, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil  # type: ignore[import-untyped]  # accelerate brings it

    return int(psutil.virtual_memory().available)
