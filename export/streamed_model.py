"""A causal LM whose weights are fetched module by module while it runs: memory for one module, not a model.

The module tree is transformers' own, with its parameters on `meta`. Before a module's forward its parameters
are fetched and put in, after it they are dropped. All windows go through together, so that every weight is
read once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import EMBEDDING, HEAD
from .nf4_base import empty_model

Fetch = Callable[[str], Tensor]
Extra = Callable[[str, Tensor], Tensor | None]


class StreamedModel:
    """Hidden states and logits in float32.

    Args:
        folder: whose config.json says the architecture.
        fetch: parameter name -> its values, in any float dtype. The embedding may be a mapped tensor: only
            the rows that are needed are read.
        extra: (module name, input [.., K]) -> what is added to a linear module's output, or None.
        device: where it computes.
    """

    def __init__(
        self, folder: Path, fetch: Fetch, *, extra: Extra | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self._model = empty_model(folder)
        self._fetch, self._extra = fetch, extra
        self._device = torch.device(device)
        for name, module in self._model.model.named_modules():
            for buffer, value in list(module.named_buffers(recurse=False)):
                setattr(module, buffer, value.to(self._device))
            if module._parameters and not isinstance(module, nn.Embedding):
                full = f"model.{name}"
                module.register_forward_pre_hook(self._fill(full))
                module.register_forward_hook(self._empty(full))

    @torch.inference_mode()
    def hidden_states(self, windows: Sequence[Sequence[int]]) -> list[Tensor]:
        """The last hidden states of each window, [T, H] float32 on the device."""
        longest = max(len(window) for window in windows)
        # padded on the right, where a causal model's earlier positions do not look
        ids = torch.tensor([[*window, *[0] * (longest - len(window))] for window in windows])  # [B, T]
        rows, place = torch.unique(ids, return_inverse=True)
        embedded = self._fetch(EMBEDDING)[rows].to(self._device, torch.float32)[place.to(self._device)]
        out = self._model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state  # [B, T, H]
        return [states[: len(window)] for states, window in zip(out, windows, strict=True)]

    @torch.inference_mode()
    def logits(self, hidden_states: Tensor) -> Tensor:
        """[M, H] -> [M, V] float32; the head is cast a block of the vocabulary at a time."""
        config = self._model.config
        head = self._fetch(EMBEDDING if config.tie_word_embeddings else HEAD)
        step = max(1, 2**24 // head.shape[1])
        parts = [
            hidden_states @ head[first : first + step].to(self._device, torch.float32).t()
            for first in range(0, head.shape[0], step)
        ]
        logits = torch.cat(parts, dim=1)
        extra = None if self._extra is None else self._extra("lm_head", hidden_states)
        return logits if extra is None else logits + extra

    def _fill(self, name: str) -> Callable[[nn.Module, Any], None]:
        def fill(module: nn.Module, _: Any) -> None:
            for parameter in list(module._parameters):
                if module._parameters[parameter] is not None:
                    values = self._fetch(f"{name}.{parameter}").to(self._device, torch.float32)
                    module._parameters[parameter] = nn.Parameter(values, requires_grad=False)

        return fill

    def _empty(self, name: str) -> Callable[[nn.Module, Any, Any], Any]:
        def empty(module: nn.Module, inputs: Any, output: Any) -> Any:
            for parameter, values in list(module._parameters.items()):
                if values is not None:
                    module._parameters[parameter] = nn.Parameter(values.to("meta"), requires_grad=False)
            if self._extra is None or not isinstance(module, nn.Linear):
                return output
            extra = self._extra(name, inputs[0])
            return output if extra is None else output + extra

        return empty
