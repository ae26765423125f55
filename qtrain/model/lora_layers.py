"""peft's LoRA layers as calls of `lora_linear`: what a layer would pass to the op, or why it can't."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qtrain.kernels import NF4Weight, lora_linear_group


@dataclass(frozen=True, slots=True)
class LoraCall:
    """One layer's arguments, without the input."""

    weight: Tensor | NF4Weight
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    bias: Tensor | None
    dropout_p: float
    dtype: torch.dtype | None  # of the matmuls; None: that of the input

    def fits_beside(self, other: LoraCall) -> bool:
        """Whether one call can serve both: a group has one dropout mask and one dtype."""
        return self.dropout_p == other.dropout_p and self.dtype == other.dtype

    def state(self) -> tuple[Any, ...]:
        """What the output depends on besides the input: equal states of a layer give equal outputs."""
        factors = (self.lora_A, self.lora_B)
        return (self.scaling, self.dropout_p, *((id(f), version(f), f.requires_grad) for f in factors))


def version(tensor: Tensor) -> int:
    """How often it was written to in place."""
    return 0 if tensor.is_inference() else tensor._version


def run_calls(x: Tensor, calls: Sequence[LoraCall]) -> tuple[Tensor, ...]:
    """The outputs of layers that share x, each in the dtype of x, or of autocast."""
    outputs = lora_linear_group(
        x if calls[0].dtype is None else x.to(calls[0].dtype),
        [call.weight for call in calls],
        [call.lora_A for call in calls],
        [call.lora_B for call in calls],
        [call.scaling for call in calls],
        biases=[call.bias for call in calls],
        dropout_p=calls[0].dropout_p,
    )
    return outputs if calls[0].dtype is None else tuple(output.to(x.dtype) for output in outputs)


def lora_call(layer: Any, dtype: torch.dtype) -> LoraCall | str:
    """What `layer` passes to the op for an input of `dtype`, or why peft's own forward has to run."""
    if type(layer) not in (PeftLinear, PeftLinear4bit):
        return f"its layer is peft's {type(layer).__name__}"
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    obstacle = _state_obstacle(layer, active) or _part_obstacle(layer, active[0])
    if obstacle is not None:
        return obstacle
    name, base = active[0], layer.base_layer
    weight = _weight(base, dtype)
    if isinstance(weight, str):
        return weight
    dropout = layer.lora_dropout[name]
    return LoraCall(
        weight,
        layer.lora_A[name].weight,
        layer.lora_B[name].weight,
        float(layer.scaling[name]),
        base.bias,
        dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0,
        base.compute_dtype if isinstance(base, Linear4bit) else None,
    )


def _state_obstacle(layer: Any, active: Sequence[str]) -> str | None:
    if layer.disable_adapters:
        return "the adapter is switched off"
    if layer.merged:
        return "the adapter is merged into the base"
    if len(active) != 1:
        return f"{len(active)} adapters are active"
    if active[0] in layer.lora_variant:
        return f"the adapter is a {type(layer.lora_variant[active[0]]).__name__}, not plain LoRA"
    return "lora_B has a bias" if layer.lora_bias.get(active[0]) else None


def _part_obstacle(layer: Any, name: str) -> str | None:
    """A part of the layer that is not what the op computes, or that somebody listens to."""
    parts = {"base_layer": layer.base_layer, "lora_A": layer.lora_A[name], "lora_B": layer.lora_B[name]}
    for part, module in parts.items():
        if type(module) not in (nn.Linear, Linear4bit):
            return f"its {part} is a {type(module).__name__}"
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            return f"its {part} has hooks"
        if "forward" in module.__dict__:  # accelerate's offloading, for one
            return f"the forward of its {part} was replaced"
        if isinstance(module.weight, DTensor):
            return f"its {part} is sharded"
    if type(layer.lora_dropout[name]) not in (nn.Dropout, nn.Identity):
        return f"its dropout is a {type(layer.lora_dropout[name]).__name__}"
    return None


def _weight(base: Any, dtype: torch.dtype) -> Tensor | NF4Weight | str:
    weight = base.weight
    if isinstance(base, Linear4bit):
        state = getattr(weight, "quant_state", None)
        state = base.quant_state if state is None else state  # FSDP makes new parameters without it
        if state is None:
            return "its weight is not quantised yet"
        try:
            return NF4Weight.from_quant_state(weight.data, state)
        except ValueError as error:
            return f"its weight can't be read: {error}"
    if weight.requires_grad:
        return "its base weight is trained"
    if weight.dtype != dtype and not torch.is_autocast_enabled(weight.device.type):
        return f"its weight is {weight.dtype} and its input {dtype}"
    return weight
