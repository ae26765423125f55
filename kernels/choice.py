"""Which implementation serves each op on a device, and why."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

HAS_TRITON = find_spec("triton") is not None

Backend = Literal["pytorch", "triton"]
# a plain global: torch.compile guards on it, and a backward sees it in whatever thread it runs
_forced: Backend | None = None


@contextmanager
def force_backend(backend: Backend) -> Iterator[None]:
    """Within this context every op takes `backend`, whatever the device.

    For comparing the two on a GPU, and for running the Triton kernels on CPU tensors under Triton's
    interpreter or an emulator. An op whose Triton path can't take the arguments then raises.
    """
    global _forced
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


def forced_backend() -> Backend | None:
    """What `force_backend` asks for here, or None."""
    return _forced


def triton_serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether an op that computes in `dtype` on `device` takes its Triton kernels here."""
    if _forced is not None:
        return _forced == "triton"
    return device.type == "cuda" and HAS_TRITON and dtype.itemsize == 2


@dataclass(frozen=True, slots=True)
class BackendChoice:
    """One op on one kind of device."""

    op: str
    backend: str
    reason: str


def backends(device_type: str) -> list[BackendChoice]:
    """The choice for every op on `cpu` or `cuda`, for 16-bit weights whose shapes its kernels take."""
    if device_type == "cuda" and HAS_TRITON:
        return [
            BackendChoice(
                "linear_logprob",
                "triton",
                "16-bit tensor cores; logits stay on the chip, their exponentials in 64 MiB chunks",
            ),
            BackendChoice(
                "lora_linear", "triton", "low-rank term and NF4 decode inside of the base's matmul"
            ),
            BackendChoice("nf4_dequantize", "triton", "one launch, nested absmax included, wide stores"),
        ]
    why = "on this CPU" if device_type == "cpu" else "because triton is not installed"
    return [
        BackendChoice("linear_logprob", "pytorch", f"tiles through torch.matmul {why}; no logits are held"),
        BackendChoice(
            "lora_linear", "pytorch", f"matmuls alone {why}, summed in place; NF4 decoded once for each use"
        ),
        BackendChoice(
            "nf4_dequantize", "pytorch", f"bitsandbytes' C code where it serves {why}, else table lookups"
        ),
    ]
