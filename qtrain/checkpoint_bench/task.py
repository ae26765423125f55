"""The task that the run was trained for: held-out prompts as token ids, and answers checked exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qtrain.data.rows import Conversation
from qtrain.data.template import ChatEncoder
from qtrain.evaluation.bootstrap import mean_interval
from qtrain.evaluation.checks import check_answer, default_check
from qtrain.evaluation.evaluate import ANSWER_SLACK, MIN_NEW_TOKENS
from qtrain.evaluation.generate import decode_text
from qtrain.evaluation.heldout import collect, prompt_of, reference_of
from qtrain.evaluation.subject import find_subject
from qtrain.export_command.source import Source
from qtrain.model.load import load_tokenizer


@dataclass(frozen=True)
class Task:
    """Prompts, and what makes an answer right.

    Attributes:
        prompts: token ids.
        stop_ids: tokens that end an answer.
        max_new_tokens: where an answer is cut, which then is wrong.
        files: the rows come from.
    """

    rows: list[Conversation]
    prompts: list[list[int]]
    stop_ids: list[int]
    max_new_tokens: int
    files: list[str]
    tokenizer: Any

    def score(self, answers: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Share of right answers, with its interval, and every answer.

        Args:
            answers: token ids in the order of the prompts, with the token that ended each where one did.
        """
        found: list[dict[str, Any]] = []
        for row, ids in zip(self.rows, answers, strict=True):
            stopped = bool(ids) and ids[-1] in self.stop_ids
            text = decode_text(self.tokenizer, ids[:-1] if stopped else ids)
            check = row.extra.get("check") or default_check(reference_of(row))
            result = check_answer(check, text)
            reason = result.reason if stopped else f"did not stop within {len(ids)} tokens"
            passed = result.passed and stopped
            found.append({"answer": text, "passed": passed, "reason": "" if passed else reason})
        interval = mean_interval([float(row["passed"]) for row in found])
        return {
            "score": interval.mean,
            "interval": [interval.low, interval.high],
            "rows": found,
            "empty": sum(not row["answer"].strip() for row in found),
            "tokens": sum(map(len, answers)),
        }


def find_task(source: Source, data: Sequence[str], limit: int, max_new_tokens: int | None) -> Task | None:
    """The run's held-out rows, or those of `data`; None where there are none and none were asked for.

    Raises:
        UserError: rows that can't be read, a tokenizer without a template.
    """
    if not limit or (source.run is None and not data):
        return None
    subject = find_subject(source.name)
    if not data and not subject.data.eval:
        return None
    found = collect([subject], data, limit)
    rows = found.conversations or [
        Conversation((*pair.prompt, *pair.chosen), pair.source, pair.extra) for pair in found.pairs
    ]
    tokenizer = load_tokenizer(str(source.base), source.model)
    settings = source.data
    encoder = ChatEncoder(
        tokenizer,
        max_length=settings.max_length,
        reasoning=settings.reasoning,
        system=settings.system,
        chat_template=settings.chat_template,
    )
    longest = max(sum(example.supervised) for row in rows for example in encoder.encode_all(row))
    ends = {tokenizer.convert_tokens_to_ids(encoder.stop_token), tokenizer.eos_token_id}
    return Task(
        rows,
        [list(encoder.encode_prompt(prompt_of(row))) for row in rows],
        sorted(token for token in ends if isinstance(token, int)),
        max_new_tokens or max(MIN_NEW_TOKENS, math.ceil(ANSWER_SLACK * longest)),
        found.files,
        tokenizer,
    )
