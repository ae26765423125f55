"""A causal LM whose forward can return label log-probs instead of logits.

The computation has to happen inside `forward`: DDP and FSDP hook into it. So the causal LM gets a
forward that, given `label_rows`, sends just those rows through `linear_logprob`, and is otherwise its
own.
"""

from __future__ import annotations

import types
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from qtrain.errors import UserError
from qtrain.kernels import force_backend, linear_logprob
from qtrain.kernels.choice import Backend
from qtrain.kernels.logprob import choose_backend

from .attention import layout_decides
from .layout import Layout


def logprob_path(model: PreTrainedModel, backend: Backend | None = None) -> str:
    """Which implementation of `linear_logprob` serves this model's head, and why."""
    chosen, reason = choose_backend(model.get_output_embeddings().weight, backend)
    return f"{chosen}: {reason}; labelled rows only"


def attach_logprob_forward(model: PreTrainedModel, backend: Backend | None = None) -> None:
    """Let `model(input_ids=..., label_rows=[L], labels=[L])` return `{"logp": [L]}`.

    `label_rows` index the flattened [batch * T] hidden states; row t predicts its label, so for a
    token at position t + 1 the row is t. `backend` forces an implementation of `linear_logprob`.

    Raises:
        UserError: the model has no plain linear output head.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"{type(model).__name__}: its output head is {type(head).__name__}, "
            "a plain linear layer is needed; take lm_head out of adapter.target_modules"
        )
    softcap, scale = _logit_transform(model)
    plain_forward = type(model).forward  # not bound: a copy of the model has to run its own

    def forward(
        self: PreTrainedModel,
        input_ids: Tensor | None = None,
        label_rows: Tensor | None = None,
        labels: Tensor | None = None,
        layout: Layout | None = None,
        **kwargs: Any,
    ) -> Any:
        if label_rows is None or labels is None:
            return plain_forward(self, input_ids=input_ids, labels=labels, **kwargs)
        extra = {} if layout is None else {"layout": layout}
        with nullcontext() if layout is None else layout_decides():
            output = self.get_decoder()(input_ids=input_ids, use_cache=False, **extra, **_for_decoder(kwargs))
        hidden_states = output.last_hidden_state.flatten(0, 1).index_select(0, label_rows)  # [L, H]
        lm_head = self.get_output_embeddings()
        with nullcontext() if backend is None else force_backend(backend):
            logp = linear_logprob(
                hidden_states, lm_head.weight, labels, bias=lm_head.bias, softcap=softcap, logit_scale=scale
            )
        return {"logp": logp}

    model.forward = types.MethodType(forward, model)


def _for_decoder(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Drop what only a causal LM's own forward knows (peft passes them on, as None)."""
    known = ("attention_mask", "position_ids", "inputs_embeds")
    return {name: value for name, value in kwargs.items() if name in known and value is not None}


def _logit_transform(model: PreTrainedModel) -> tuple[float | None, float]:
    """Soft-cap (Gemma 2) and scale (Granite divides, Cohere multiplies) of the model's logits."""
    config = model.config.get_text_config(decoder=True)
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    divisor = float(getattr(config, "logits_scaling", None) or 1.0)
    return (None if softcap is None else float(softcap)), scale / divisor
