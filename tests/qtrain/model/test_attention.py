"""Packed batches give each sequence what it would get alone: log-probs and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from qtrain.data.rows import Source
from qtrain.data.template import EncodedExample, EncodedPair
from qtrain.errors import UserError
from qtrain.model.attention import PACKED, choose_attention
from qtrain.model.logprob import attach_logprob_forward
from qtrain.recipe.schema import ModelSettings
from qtrain.training.batch import pair_collator, sequence_sums, sft_collator
from tests.qtrain.tiny import tiny_qwen2

SOURCE = Source("rows.jsonl", 1)
SHAPE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip
FAMILIES = {
    "qwen2": lambda: tiny_qwen2(97),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(head_dim=8, **SHAPE)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "mistral, window 6": lambda: MistralForCausalLM(MistralConfig(sliding_window=6, **SHAPE)),
}


def _model(family: str, implementation: str) -> Any:
    torch.manual_seed(0)
    model = FAMILIES[family]()
    model.set_attn_implementation(implementation)
    attach_logprob_forward(model)
    return model.eval()


def _run(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    names = ("input_ids", "attention_mask", "position_ids", "layout", "label_rows", "labels")
    model.zero_grad()
    logp = model(**{name: batch[name] for name in names if name in batch})["logp"]
    sums = sequence_sums(logp, batch["lengths"])
    (sums * torch.arange(1.0, len(sums) + 1)).sum().backward()
    return sums.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def _assert_same(one: tuple[Any, list[Any]], two: tuple[Any, list[Any]]) -> None:
    # fp32: the same products, summed in another order; gradients here are of the order of 100
    torch.testing.assert_close(one[0], two[0], rtol=1e-4, atol=1e-4)
    for a, b in zip(one[1], two[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


def _examples(lengths: list[int], seed: int) -> list[tuple[int, EncodedExample]]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number, length in enumerate(lengths):
        ids = torch.randint(0, 97, (length,), generator=generator).tolist()
        supervised = (torch.rand(length, generator=generator) < 0.6).tolist()
        supervised[-1] = True
        rows.append((number, EncodedExample(ids, supervised, SOURCE, 0)))
    return rows


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_padded(family: str) -> None:
    rows = _examples([5, 17, 2, 9], 0)
    packed = _run(_model(family, PACKED), sft_collator(packed=True, pad_token_id=0)(rows))
    padded = _run(_model(family, "sdpa"), sft_collator(packed=False, pad_token_id=0)(rows))
    _assert_same(packed, padded)


@settings(max_examples=12, deadline=None)
@given(lengths=st.lists(st.integers(2, 24), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_neighbours_do_not_matter(lengths: list[int], seed: int) -> None:
    model = _model("qwen2", PACKED)
    collate = sft_collator(packed=True, pad_token_id=0)
    rows = _examples(lengths, seed)
    with torch.no_grad():
        names = ("input_ids", "position_ids", "layout", "label_rows", "labels")
        together = collate(rows)
        whole = model(**{name: together[name] for name in names})["logp"].split(together["lengths"])
        for row, part in zip(rows, whole, strict=True):
            alone = collate([row])
            logp = model(**{name: alone[name] for name in names})["logp"]
            torch.testing.assert_close(part, logp, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prompt_equals_two_sequences(family: str) -> None:
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> list[int]:
        return torch.randint(0, 97, (length,), generator=generator).tolist()

    pairs = [
        (number, EncodedPair(ids(prompt), ids(chosen), ids(rejected), SOURCE, 0))
        for number, (prompt, chosen, rejected) in enumerate([(7, 4, 9), (1, 1, 1), (12, 8, 3)])
    ]
    model = _model(family, PACKED)
    shared = pair_collator(packed=True, share_prompts=True, pad_token_id=0)(pairs)
    apart = pair_collator(packed=True, share_prompts=False, pad_token_id=0)(pairs)
    padded = pair_collator(packed=False, share_prompts=False, pad_token_id=0)(pairs)
    assert shared["input_ids"].numel() == apart["input_ids"].numel() - 20
    _assert_same(_run(model, shared), _run(model, apart))
    _assert_same(_run(model, apart), _run(_model(family, "sdpa"), padded))


def test_generation_is_not_affected() -> None:
    ids = torch.arange(3, 12).unsqueeze(0)
    ours, theirs = (
        _model("qwen2", name).generate(input_ids=ids, max_new_tokens=8, do_sample=False)
        for name in (PACKED, "sdpa")
    )
    assert torch.equal(ours, theirs)


def test_the_log_probs_are_those_of_the_logits() -> None:
    model = _model("qwen2", "sdpa")
    batch = sft_collator(packed=False, pad_token_id=0)(_examples([6, 11], 3))
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        expected = logits.log_softmax(-1).flatten(0, 1)[batch["label_rows"]]
        names = ("input_ids", "attention_mask", "label_rows", "labels")
        logp = model(**{name: batch[name] for name in names})["logp"]
    torch.testing.assert_close(logp, expected.gather(1, batch["labels"][:, None])[:, 0], rtol=1e-4, atol=1e-4)


def test_choice_is_made_with_a_reason() -> None:
    config = Qwen2Config(**SHAPE)
    assert choose_attention(ModelSettings(), config, packing=True).packed
    assert not choose_attention(ModelSettings(), config, packing=False).packed
    assert not choose_attention(ModelSettings(attention="sdpa"), config, packing=True).packed


def test_a_model_that_cannot_be_packed_is_padded_or_refused() -> None:
    from transformers import Gemma2Config

    config = Gemma2Config(attn_logit_softcapping=50.0)
    choice = choose_attention(ModelSettings(), config, packing=True)
    assert (choice.implementation, choice.packed) == ("sdpa", False)
    assert "soft-capped" in choice.reason
    with pytest.raises(UserError, match=r"packed can't serve this model: .*soft-capped.*; use auto or sdpa"):
        choose_attention(ModelSettings(attention="packed"), config, packing=True)
