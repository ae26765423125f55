"""Which implementation serves each op on a device, and why."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

Backend = Literal["pytorch", "triton"]
_forced: ContextVar[Backend | None] = ContextVar("qtrain_forced_backend", default=None)


@contextmanager
def force_backend(backend: Backend) -> Iterator[None]:
    """Within this context every op takes `backend`, whatever the device.

    For comparing the two on a GPU, and for running the Triton kernels on CPU tensors under Triton's
    interpreter or an emulator. An op whose Triton path can't take the arguments then raises.
    """
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)


def forced_backend() -> Backend | None:
    """What `force_backend` asks for here, or None."""
    return _forced.get()


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
