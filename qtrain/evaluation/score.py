"""What one model makes of the held-out rows: answers and their checks, reference loss, preferences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.data.rows import Conversation, PreferencePair
from qtrain.data.template import ChatEncoder, EncodedExample, EncodedPair
from qtrain.model.load import Base
from qtrain.training.batch import Batch, pair_collator, sequence_sums, sft_collator

from .checks import check_answer, default_check
from .generate import Answer, generate
from .heldout import prompt_of, reference_of

SCORED_TOKENS = 2048  # of one forward that scores references; more costs a CPU page faults and gains nothing

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class RowScore:
    """One held-out row under one model."""

    source: str  # file:line
    kind: str  # of the check
    prompt: str  # the user's last message
    reference: str
    answer: str
    passed: bool
    reason: str  # why it did not pass
    tokens: int  # generated
    stopped: bool
    nll: float  # of the reference's supervised tokens, summed, in nats
    nll_tokens: int


@dataclass(frozen=True, slots=True)
class PairScore:
    """One preference pair under one model: log-probs of the answers, summed over their tokens."""

    source: str
    prompt: str
    chosen: float
    rejected: float
    chosen_tokens: int
    rejected_tokens: int

    @property
    def right(self) -> bool:
        """The chosen answer is the likelier one."""
        return self.chosen > self.rejected

    @property
    def right_per_token(self) -> bool:
        """The same with each log-prob divided by its tokens, so that short answers have no advantage."""
        return self.chosen / self.chosen_tokens > self.rejected / self.rejected_tokens

    @property
    def margin(self) -> float:
        """How much likelier, in nats."""
        return self.chosen - self.rejected


def make_encoder(base: Base, settings: Any) -> ChatEncoder:
    """The encoder that training used, from a recipe's data section."""
    return ChatEncoder(
        base.tokenizer,
        max_length=settings.max_length,
        reasoning=settings.reasoning,
        system=settings.system,
        chat_template=settings.chat_template,
    )


def stop_ids(base: Base, encoder: ChatEncoder) -> frozenset[int]:
    """Tokens that end an answer: the template's turn end, and the EOS of tokenizer and generation config."""
    found = {base.tokenizer.convert_tokens_to_ids(encoder.stop_token), base.tokenizer.eos_token_id}
    configured = getattr(base.model.generation_config, "eos_token_id", None)
    found |= set(configured) if isinstance(configured, (list, tuple)) else {configured}
    return frozenset(token for token in found if isinstance(token, int))


def score_answers(
    model: nn.Module,
    base: Base,
    encoder: ChatEncoder,
    rows: Sequence[Conversation],
    *,
    max_new_tokens: int,
    batch_size: int,
    advance: Advance,
) -> list[RowScore]:
    """Answer every row greedily and check it; score its reference.

    Raises:
        DataError: a row that the template refuses or whose reference is cut off altogether.
    """
    answers = generate(
        model,
        base.tokenizer,
        [encoder.encode_prompt(prompt_of(row)) for row in rows],
        stop_ids(base, encoder),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        advance=advance,
    )
    references = reference_nll(model, base, encoder, rows, advance)
    return [
        _checked(row, answer, nll, tokens)
        for row, answer, (nll, tokens) in zip(rows, answers, references, strict=True)
    ]


def _checked(row: Conversation, answer: Answer, nll: float, tokens: int) -> RowScore:
    """An answer that had to be cut has not passed, whatever its text: served, it would run on."""
    check = row.extra.get("check") or default_check(reference_of(row))
    result = check_answer(check, answer.text)
    reason = result.reason if answer.stopped else f"did not stop within {answer.tokens} tokens"
    return RowScore(
        source=str(row.source),
        kind=str(check["kind"]),
        prompt=prompt_of(row)[-1].content,
        reference=reference_of(row),
        answer=answer.text,
        passed=result.passed and answer.stopped,
        reason="" if result.passed and answer.stopped else reason,
        tokens=answer.tokens,
        stopped=answer.stopped,
        nll=nll,
        nll_tokens=tokens,
    )


def reference_nll(
    model: nn.Module, base: Base, encoder: ChatEncoder, rows: Sequence[Conversation], advance: Advance
) -> list[tuple[float, int]]:
    """(-sum of logp, number) of every row's supervised tokens: what training minimises."""
    examples: list[EncodedExample] = []
    owners: list[int] = []
    for number, row in enumerate(rows):
        for example in encoder.encode_all(row):
            examples.append(example)
            owners.append(number)
    collate = sft_collator(packed=base.attention.packed, pad_token_id=base.tokenizer.pad_token_id)
    sums, counts = [0.0] * len(rows), [0] * len(rows)
    for numbers in _batches([len(example.input_ids) for example in examples], base.attention.packed):
        batch = collate([(number, examples[number]) for number in numbers])
        scores = sequence_sums(_logps(model, batch), batch["lengths"]).tolist()
        for number, score, length in zip(numbers, scores, batch["lengths"], strict=True):
            sums[owners[number]] -= score
            counts[owners[number]] += length
        advance(len(numbers))
    return list(zip(sums, counts, strict=True))


def score_pairs(
    model: nn.Module, base: Base, encoder: ChatEncoder, pairs: Sequence[PreferencePair], advance: Advance
) -> list[PairScore]:
    """Log-probs of both answers of every pair.

    Raises:
        DataError: a pair that the template refuses or that max_length cuts off.
    """
    encoded = [encoder.encode_pair(pair) for pair in pairs]
    packed = base.attention.packed
    collate = pair_collator(packed=packed, share_prompts=packed, pad_token_id=base.tokenizer.pad_token_id)
    found: list[PairScore | None] = [None] * len(pairs)
    for numbers in _batches([_pair_length(pair) for pair in encoded], packed):
        batch = collate([(number, encoded[number]) for number in numbers])
        sums = sequence_sums(_logps(model, batch), batch["lengths"]).view(-1, 2).tolist()
        for number, (chosen, rejected) in zip(numbers, sums, strict=True):
            found[number] = PairScore(
                str(pairs[number].source),
                pairs[number].prompt[-1].content,
                chosen,
                rejected,
                len(encoded[number].chosen_ids),
                len(encoded[number].rejected_ids),
            )
        advance(len(numbers))
    return [score for score in found if score is not None]


def _pair_length(pair: EncodedPair) -> int:
    return 2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)


def _batches(lengths: list[int], packed: bool) -> Iterator[list[int]]:
    """Row numbers of like length, together up to SCORED_TOKENS (padding counted)."""
    batch: list[int] = []
    total = 0
    for number in sorted(range(len(lengths)), key=lambda n: lengths[n], reverse=True):
        width = lengths[number] if packed or not batch else lengths[batch[0]]
        if batch and total + width > SCORED_TOKENS:
            yield batch
            batch, total = [], 0
        batch.append(number)
        total += width
    if batch:
        yield batch


@torch.inference_mode()
def _logps(model: nn.Module, batch: Batch) -> Tensor:
    """Log-probs of the batch's labels, [L], in float32 on the CPU."""
    device = next(model.parameters()).device
    names = ("input_ids", "attention_mask", "position_ids", "layout", "label_rows", "labels")
    inputs = {name: batch[name] for name in names if name in batch}
    logp: Tensor = model(**{n: v.to(device) if isinstance(v, Tensor) else v for n, v in inputs.items()})[
        "logp"
    ]
    return logp.float().cpu()
