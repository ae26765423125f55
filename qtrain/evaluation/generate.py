"""Decoding: many prompts at once for evaluation, one for a chat.

Prompts are padded on the left and masked there; a row that has stopped leaves the batch, so that the
slowest answer does not keep the others computing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

# what a model calls its keys and values: `past_key_values` until transformers 5.23
CACHE = next(
    name for name in ("cache", "past_key_values") if name in CausalLMOutputWithPast.__dataclass_fields__
)
BATCH_TOKENS = 2**15  # prompts and answers of a batch: what its KV cache and its first forward have to hold

Pick = Callable[[Tensor], Tensor]  # logits [B, V] -> tokens [B]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model made of a prompt."""

    text: str  # without the stop token
    tokens: int  # generated, the stop token included
    stopped: bool  # whether it stopped by itself


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    stop_ids: Collection[int],
    *,
    max_new_tokens: int,
    batch_size: int,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Answer]:
    """Greedy answers, in the order of `prompts`; rows of like length are decoded together.

    A batch has at most `batch_size` rows and `BATCH_TOKENS` tokens.

    `advance(n)` is called when n more rows have their answer.
    """
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]), reverse=True)
    made: list[list[int]] = [[] for _ in prompts]
    start = 0
    while start < len(order):
        length = len(prompts[order[start]]) + max_new_tokens  # of the longest row that is left
        rows = order[start : start + min(batch_size, max(BATCH_TOKENS // length, 1))]
        start += len(rows)
        steps = decode_steps(
            model, [prompts[row] for row in rows], stop_ids, greedy, max_new_tokens=max_new_tokens
        )
        for step in steps:
            for number, token in step:
                made[rows[number]].append(token)
            advance(sum(token in stop_ids for _, token in step))
        advance(sum(made[row][-1] not in stop_ids for row in rows))
    return [_answer(tokenizer, ids, stop_ids) for ids in made]


def greedy(logits: Tensor) -> Tensor:
    """The likeliest token."""
    return logits.max(dim=-1).indices  # argmax takes five times as long on bf16 on a CPU


def sampler(temperature: float, seed: int) -> Pick:
    """Tokens drawn from softmax(logits / temperature); temperature 0 is greedy."""
    if temperature == 0:
        return greedy
    generator = torch.Generator().manual_seed(seed)

    def pick(logits: Tensor) -> Tensor:
        probabilities = torch.softmax(logits.float().cpu() / temperature, dim=-1)
        return torch.multinomial(probabilities, 1, generator=generator).squeeze(1).to(logits.device)

    return pick


@torch.inference_mode()
def decode_steps(
    model: Any,
    prompts: Sequence[Sequence[int]],
    stop_ids: Collection[int],
    pick: Pick,
    *,
    max_new_tokens: int,
) -> Iterator[list[tuple[int, int]]]:
    """Yield, step by step, (prompt number, token) for every prompt that has not stopped before.

    Raises:
        ValueError: an empty prompt.
    """
    if not all(prompts):
        raise ValueError("an empty prompt has nothing to go on from")
    device = next(model.parameters()).device
    ids, mask = (part.to(device) for part in _left_padded(prompts))
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)  # [B, W]
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    alive = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{CACHE: cache},
        )
        tokens = pick(output.logits[:, -1])  # [B]
        step = list(zip(alive, tokens.tolist(), strict=True))
        yield step
        kept = [place for place, (_, token) in enumerate(step) if token not in stop_ids]
        if not kept:
            return
        if len(kept) < len(alive):
            index = torch.tensor(kept, device=device)
            cache.batch_select_indices(index)
            mask, positions, tokens = mask[index], positions[index], tokens[index]
            alive = [alive[place] for place in kept]
        ids = tokens.unsqueeze(1)  # [B, 1]
        mask = torch.cat((mask, mask.new_ones(len(alive), 1)), dim=1)
        positions = positions[:, -1:] + 1


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """ids and mask, [B, W]; padding is masked by place, so its id (0) is never read."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def _answer(tokenizer: Any, ids: list[int], stop_ids: Collection[int]) -> Answer:
    stopped = bool(ids) and ids[-1] in stop_ids
    text = decode_text(tokenizer, ids[:-1] if stopped else ids)
    return Answer(text, len(ids), stopped)


def decode_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of tokens, spaces as they are."""
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
