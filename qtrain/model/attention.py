"""Attention over sequences that lie end to end, kept inside each of them.

Every block of the layout is one call of `scaled_dot_product_attention`: the cost is the sum of the
squares of the lengths, no [T, T] mask of the whole batch is made, and the result of a sequence does
not depend on its neighbours. It is registered with transformers under the name `qtrain_packed`;
without a layout (generation, padded batches) it is transformers' own sdpa attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qtrain.errors import UserError
from qtrain.recipe.schema import ModelSettings

from .layout import Block, Layout

PACKED = "qtrain_packed"

_masks_off: ContextVar[bool] = ContextVar("masks_off", default=False)


@contextmanager
def layout_decides() -> Iterator[None]:
    """While the model's forward runs with a layout, transformers need not build a [T, T] mask."""
    token = _masks_off.set(True)
    try:
        yield
    finally:
        _masks_off.reset(token)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return None if _masks_off.get() else sdpa_mask(*args, **kwargs)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """softmax(q k^T * scaling) v inside each block; query [1, heads, T, D] -> [1, T, heads, D].

    key and value are [1, kv_heads, T, D] with heads a multiple of kv_heads.
    """
    if layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    parts = [_attend(query, key, value, block, scaling, dropout, sliding_window) for block in layout.blocks]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block: Block,
    scaling: float | None,
    dropout: float,
    window: int | None,
) -> Tensor:
    own = slice(block.start, block.stop)
    q, k, v = query[:, :, own], key[:, :, own], value[:, :, own]
    if block.prefix:
        before = slice(block.prefix_start, block.prefix_stop)
        k, v = torch.cat((key[:, :, before], k), dim=2), torch.cat((value[:, :, before], v), dim=2)
    mask = None
    if block.prefix or (window is not None and k.shape[2] > window):
        mask = _band(q.shape[2], k.shape[2], window, q.device)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
    )


def _band(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Causal mask aligned to the last key; with a window, only its last `window` keys."""
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return mask if window is None else mask.triu(keys - queries - window + 1)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, _mask)


@dataclass(frozen=True, slots=True)
class AttentionChoice:
    """What transformers is told, whether batches may be packed, and why."""

    implementation: str
    packed: bool
    reason: str


def choose_attention(settings: ModelSettings, config: PreTrainedConfig, packing: bool) -> AttentionChoice:
    """Pick the attention for a model's configuration.

    Raises:
        UserError: `packed` was asked for by name and the model can't be packed.
    """
    obstacle = _obstacle(config)
    if settings.attention in ("sdpa", "eager", "flash_attention_2"):
        return AttentionChoice(settings.attention, False, "asked for; batches are padded")
    if obstacle is not None:
        if settings.attention == "packed":
            raise UserError(f"model.attention: packed can't serve this model: {obstacle}; use auto or sdpa")
        return AttentionChoice("sdpa", False, f"batches are padded: {obstacle}")
    if not packing:
        return AttentionChoice(PACKED, False, "training.packing is false: batches are padded")
    return AttentionChoice(PACKED, True, "one attention call a sequence, no padding")


def _obstacle(config: PreTrainedConfig) -> str | None:
    """Why attention over a packed batch would be wrong for this model, or None."""
    text = config.get_text_config(decoder=True)
    if getattr(text, "attn_logit_softcapping", None):
        return "its attention logits are soft-capped, which scaled_dot_product_attention can't do"
    unknown = set(getattr(text, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if unknown:
        return f"it has {', '.join(sorted(unknown))} layers, which carry state across sequences"
    model_class = _model_class(config)
    if model_class is None or not getattr(model_class, "_supports_attention_backend", False):
        return f"{config.model_type} does not pass its attention through transformers' attention interface"
    return None


def _model_class(config: PreTrainedConfig) -> type | None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        return None
