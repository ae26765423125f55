"""`lora_linear` in place of the arithmetic of peft's LoRA layers, and a record of who serves what.

Parameters stay where peft has them: saving, loading, merging and switching adapters are peft's. Only the
forward of a layer is replaced, and whenever the layer is in a state that the op does not know (several
adapters, DoRA, merged, switched off, hooks) peft's forward runs, and the reason is kept.
"""

from __future__ import annotations

import types
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from qtrain.kernels import NF4Weight
from qtrain.kernels.lora import backend

from .lora_layers import LoraCall, lora_call, run_calls
from .shared_input import SHARING, SharedInput


@dataclass(frozen=True, slots=True)
class LayerPath:
    """Who serves one LoRA layer, and why."""

    path: str  # pytorch or triton (of lora_linear), or peft
    reason: str
    shares: tuple[str, ...] = ()  # layers that are computed with it

    def __str__(self) -> str:
        shared = f"; one input for {' + '.join(self.shares)}" if self.shares else ""
        return f"{self.path}: {self.reason}{shared}"


@dataclass(slots=True)
class LoraKernels:
    """The path of every LoRA layer, and what happened to it while the model ran."""

    layers: dict[str, LayerPath]
    fallbacks: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    def summary(self) -> str:
        """A line for people: how many layers take which path, why, and which share their input."""
        counts = Counter(f"{path.path}: {path.reason}" for path in self.layers.values())
        shares = dict.fromkeys(" + ".join(path.shares) for path in self.layers.values() if path.shares)
        text = " | ".join(f"{count} layers {path}" for path, count in counts.most_common())
        return f"{text}; one input for {', '.join(shares)}" if shares else text

    def as_dict(self) -> dict[str, str]:
        """For the manifest: every layer by its name in the model."""
        return {name: str(path) for name, path in self.layers.items()}


def keep_peft(model: nn.Module) -> LoraKernels:
    """Leave everything to peft: the record of `kernels: off`."""
    return LoraKernels({name: LayerPath("peft", "kernels is off") for name, _ in _lora_layers(model)})


def use_lora_kernels(model: nn.Module, dtype: torch.dtype) -> LoraKernels:
    """Let `lora_linear` serve the LoRA layers of a peft model whose activations are of `dtype`."""
    table = LoraKernels({})
    calls: dict[str, LoraCall] = {}
    for name, layer in _lora_layers(model):
        call = lora_call(layer, dtype)
        if isinstance(call, str):
            table.layers[name] = LayerPath("peft", call)
        else:
            calls[name] = call
            table.layers[name] = _path(call, dtype, ())
            _replace_forward(layer, name, table)
    for names, layers in _groups(model, calls):
        group = SharedInput(*layers)
        for name in names:
            model.get_submodule(name).__dict__["_shared_input"] = group
            table.layers[name] = _path(calls[name], dtype, tuple(group.layers))
    return table


def _lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def _path(call: LoraCall, dtype: torch.dtype, shares: tuple[str, ...]) -> LayerPath:
    where, reason = backend(call.lora_A.device, call.dtype or dtype, [call.weight])
    quantised = isinstance(call.weight, NF4Weight)
    weight = "NF4 base" if quantised else f"{str(call.weight.dtype).removeprefix('torch.')} base"
    return LayerPath(where, f"{weight}, {reason}", shares)


def _groups(
    model: nn.Module, calls: dict[str, LoraCall]
) -> list[tuple[list[str], tuple[nn.Module, dict[str, Any]]]]:
    """Blocks with two or more served layers that share their input: full names, and (block, layers)."""
    found = []
    for block_name, block in model.named_modules():
        prefix = f"{block_name}." if block_name else ""
        for sharing in SHARING:
            members = [child for child in sharing if f"{prefix}{child}" in calls]
            if len(members) > 1:
                layers = {child: getattr(block, child) for child in members}
                found.append(([f"{prefix}{child}" for child in members], (block, layers)))
    return found


def _replace_forward(layer: Any, name: str, table: LoraKernels) -> None:
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        call = "it was called with more than its input" if args or kwargs else lora_call(self, x.dtype)
        if isinstance(call, str):
            table.fallbacks[call].add(name)
            return type(self).forward(self, x, *args, **kwargs)
        group = self.__dict__.get("_shared_input")
        if group is None or group.given_up or torch.compiler.is_compiling():
            (output,) = run_calls(x, [call])
            return output
        return group.output(self, call, x)

    layer.forward = types.MethodType(forward, layer)
