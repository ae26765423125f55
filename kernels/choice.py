"""Which implementation serves each op on a device, and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BackendChoice:
    """One op on one kind of device."""

    op: str
    backend: str
    reason: str


def backends(device_type: str) -> list[BackendChoice]:
    """The choice for every op on `cpu` or `cuda`."""
    where = "on this CPU" if device_type == "cpu" else "on CUDA as well"
    return [
        BackendChoice(
            "linear_logprob",
            "pytorch",
            f"tiles of 512 tokens x 4096 words through torch.matmul {where}; logits are never held",
        ),
        BackendChoice(
            "lora_linear",
            "peft",
            "the adapter's stock module over bitsandbytes' 4-bit or torch's 16-bit matmul",
        ),
    ]
