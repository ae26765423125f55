"""Layers that read the same tensor, computed together: q/k/v of an attention, gate/up of an MLP.

The model still calls them one by one. The first that is called computes the outputs of all, the others
take theirs, provided that they are called with that very tensor and nothing has changed in between.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .lora_layers import LoraCall, lora_call, run_calls, version

SHARING = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("w1", "w3"),
)
MISSES = 3  # outputs computed in vain before a group is given up


class SharedInput:
    """The LoRA layers of one block that share their input, and the outputs that wait to be taken."""

    def __init__(self, block: nn.Module, layers: dict[str, Any]) -> None:
        self.layers = layers  # by their names in the block
        self.given_up = False
        self._misses = 0
        self._waiting: dict[int, tuple[Any, Tensor]] = {}  # by layer: its state, its output
        self._x: Tensor | None = None
        self._moment: tuple[Any, ...] = ()
        # no output outlives the block's forward, whatever ends it
        self._hook = block.register_forward_hook(self._after_block, always_call=True)

    def output(self, layer: Any, call: LoraCall, x: Tensor) -> Tensor:
        """Of `layer` for x: one that waits, or a new one, and then those of the others wait."""
        waiting = self._waiting.get(id(layer))
        if waiting is not None:
            state, output = waiting
            if x is self._x and self._moment == _moment(x) and state == call.state():
                del self._waiting[id(layer)]
                if not self._waiting:
                    self._clear()
                return output
        if self._waiting:
            self._miss()
        return self._compute(layer, call, x)

    def _compute(self, layer: Any, call: LoraCall, x: Tensor) -> Tensor:
        self._clear()
        calls = {id(layer): call}
        for other in () if self.given_up else self.layers.values():
            theirs = call if other is layer else lora_call(other, x.dtype)
            if not isinstance(theirs, str) and theirs.fits_beside(call):
                calls.setdefault(id(other), theirs)
        outputs = run_calls(x, list(calls.values()))
        (_, own), *others = zip(calls, outputs, strict=True)
        if others:
            self._x, self._moment = x, _moment(x)
            self._waiting = {key: (calls[key].state(), output) for key, output in others}
        return own

    def _miss(self) -> None:
        self._misses += 1
        self.given_up = self._misses >= MISSES

    def _clear(self) -> None:
        self._waiting = {}
        self._x = None
        self._moment = ()

    def _after_block(self, *_: Any) -> None:
        self._clear()


def _moment(x: Tensor) -> tuple[Any, ...]:
    """What else an output depends on: a later write to x, grad mode, autocast."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return version(x), torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast
