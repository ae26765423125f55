"""Whether a device's bfloat16 products are faster than its float32 ones."""

from __future__ import annotations

import torch

AMPERE = (8, 0)  # compute capability


def multiplies_bf16(device: torch.device) -> bool:
    """Tensor cores or CPU instructions for bfloat16; elsewhere such products are emulated, and slow."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= AMPERE
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)
