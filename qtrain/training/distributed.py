"""What was asked of accelerate is what runs: accelerate changes some requests without a word."""

from __future__ import annotations

import os
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from qtrain.errors import UserError


def wrapping(model: nn.Module) -> str:
    """How the model is distributed: `fsdp`, `ddp`, `deepspeed` or `none`."""
    if isinstance(model, FSDPModule | FullyShardedDataParallel):
        return "fsdp"
    if isinstance(model, DistributedDataParallel):
        return "ddp"
    if type(model).__name__ == "DeepSpeedEngine":
        return "deepspeed"
    return "none"


def requested(fsdp: bool) -> str | None:
    """What the recipe or `accelerate launch` asked for, or None where nothing special was."""
    truthy = ("1", "true", "yes")
    if fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in truthy:
        return "fsdp"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in truthy:
        return "deepspeed"
    return None


def check_wrapping(model: nn.Module, accelerator: Any, *, fsdp: bool) -> None:
    """Compare the request with what was really wrapped.

    Raises:
        UserError: FSDP or DeepSpeed was asked for and something else would run.
    """
    want, got = requested(fsdp), wrapping(model)
    if want is not None and got != want:
        raise UserError(
            f"{want} was asked for, but accelerate made {'no wrapper' if got == 'none' else got} of it "
            f"({accelerator.num_processes} process(es) on {accelerator.device}); {want} needs several CUDA "
            f"devices. Leave it out to train with {'DDP' if accelerator.num_processes > 1 else 'one process'}"
        )
    if accelerator.num_processes > 1 and got == "none":
        raise UserError(
            f"{accelerator.num_processes} processes were started, but the model was not distributed over them"
        )


def main_process() -> bool:
    """Whether this process writes files and speaks."""
    return int(os.environ.get("RANK", "0")) == 0


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))
