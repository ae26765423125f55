"""From messages to token ids and the mask of what is learnt, by rendering prefixes of the conversation.

For the assistant's turn i of messages m:

    prefix = render(m[:i], generation prompt)       what serving will show the model
    full   = render(m[:i+1]),  full = prefix + answer + turn end
    learnt: the tokens of the answer and of the stop token that begins the turn end

The ids of `prefix` are those of the text tokenised by itself, as serving does it. Nothing is looked
for in the ids, so that pad == eos or an answer which quotes the template can't shift the mask.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from qtrain.data.chat_template import ChatTemplate, RefusedByTemplate, adds_bos, unlike_prompt
from qtrain.data.records import shorten
from qtrain.data.rows import Conversation, Message, PreferencePair, Source
from qtrain.errors import DataError, UserError

Reasoning = Literal["think", "plain", "drop"]


class CutOff(DataError):
    """A row whose prompt alone fills max_length."""


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """Token ids with the mask of those to learn."""

    input_ids: list[int]  # [T]
    supervised: list[bool]  # [T]: token t is a target, predicted from the tokens before it
    source: Source
    cut: int  # tokens that did not fit into max_length


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """A prompt and two completions; every completion token is a target, the stop token included."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    source: Source
    cut: int  # tokens that did not fit into max_length, of both completions together


@dataclass(frozen=True, slots=True)
class _Turn:
    prefix: list[int]
    answer: list[int]  # up to the stop token; what the template writes behind it is the next turn's context


class ChatEncoder:
    """Encodes rows for one tokenizer.

    Args:
        tokenizer: a transformers tokenizer.
        max_length: tokens kept of a row (of prompt + completion for a pair); the end is cut.
        reasoning: `think` puts "<think>\\n{reasoning}\\n</think>\\n\\n" before the answer, `plain`
            "{reasoning}\\n\\n", `drop` nothing.
        system: the system message of rows that have none; None leaves it to the template.
        chat_template: `chatml` or the path of a Jinja file, instead of the tokenizer's own template.

    Attributes:
        chat_template: the Jinja text in use; a run saves it with the tokenizer.
        stop_token: ends every answer.
        notes: choices made for this tokenizer that a user should know of.

    Raises:
        UserError: no usable template, or nothing that could end an answer.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int,
        reasoning: Reasoning = "think",
        system: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._reasoning = reasoning
        self._system = None if system is None else Message("system", system)
        self._template = ChatTemplate(tokenizer, chat_template)
        self.chat_template = self._template.source
        self.notes = list(self._template.notes)
        self._special = _special_tokens(tokenizer)
        self.stop_token, self._stop_text = self._find_stop()
        self._bos: list[int] = []
        bos = [tokenizer.bos_token_id]
        if adds_bos(tokenizer) and self.encode_prompt((Message("user", "a"),), check=False)[:1] != bos:
            self._bos = bos
            self.notes.append(
                f"{tokenizer.bos_token} is put first: the tokenizer adds it, the template does not"
            )

    def encode(self, conversation: Conversation) -> EncodedExample:
        """The one example of a conversation.

        Raises:
            DataError: as `encode_all`; or there are several, because answers change once they are history.
        """
        examples = self.encode_all(conversation)
        if len(examples) > 1:
            raise _bad(
                conversation.source, "its earlier answers are other tokens once they are history: encode_all"
            )
        return examples[0]

    def encode_all(self, conversation: Conversation) -> list[EncodedExample]:
        """As few examples as show every answer behind the very ids that serving will show before it.

        That is one, unless an answer is other text once it is history (Qwen3 takes its reasoning out)
        or other tokens (GPT-2's splitting reads "\\n\\n" in another way before a letter): then a new
        example begins, with the history as context.

        Raises:
            DataError: with file:line; no assistant turn, nothing learnt fits into max_length, the
                template refuses the row or does not write all of it.
        """
        messages = self._prepared(conversation.messages)
        ids: list[int] = []
        mask: list[bool] = []
        built: list[tuple[list[int], list[bool]]] = []
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            turn = self._turn(messages[: index + 1], conversation.source)
            if turn.prefix[: len(ids)] != ids:
                built.append((ids, mask))
                ids, mask = [], []
            context = turn.prefix[len(ids) :]
            ids = ids + context + turn.answer
            mask = mask + [False] * len(context) + [True] * len(turn.answer)
        if not ids:
            raise _bad(conversation.source, "has no assistant turn, so that there is nothing to learn")
        built.append((ids, mask))
        return self._fit(built, conversation.source)

    def encode_pair(self, pair: PreferencePair) -> EncodedPair:
        """Prompt and completions of a pair.

        Raises:
            DataError: with file:line; as `encode_all`, or the completions are the same once encoded.
        """
        prompt = self._prepared(pair.prompt)
        turns = [
            self._turn((*prompt, *self._prepared(answer, add_system=False)), pair.source)
            for answer in (pair.chosen, pair.rejected)
        ]
        prefix = turns[0].prefix
        room = self._max_length - len(prefix)
        if room <= 0:
            raise _bad(pair.source, self._too_long(len(prefix), "both completions are"), CutOff)
        chosen, rejected = (turn.answer[:room] for turn in turns)
        if chosen == rejected:
            cut = turns[0].answer != turns[1].answer
            why = (
                f"within data.max_length: {self._max_length}"
                if cut
                else f"with data.reasoning: {self._reasoning}"
            )
            raise _bad(pair.source, f"'chosen' and 'rejected' are the same {why}")
        cut_off = sum(max(len(turn.answer) - room, 0) for turn in turns)
        return EncodedPair(prefix, chosen, rejected, pair.source, cut_off)

    def encode_prompt(self, messages: Sequence[Message], *, check: bool = True) -> list[int]:
        """The ids up to where the assistant's answer to `messages` begins: training's prefix, uncut.

        Raises:
            RefusedByTemplate: the template raises an error, or leaves a message out (unless not `check`).
        """
        return self._tokens(self._prefix(self._prepared(messages), check=check), head=True)

    def render(self, messages: Sequence[Message]) -> str:
        """The text of a conversation, or of a prompt with the head of the assistant's turn."""
        prepared = self._prepared(messages)
        return self._template.render(prepared, generation_prompt=prepared[-1].role != "assistant")

    def special_token_in(self, messages: Sequence[Message]) -> str | None:
        """The first special token that stands as text in a message (and becomes that token), or None."""
        for message in messages:
            for token in self._special:
                if token in message.content or (message.reasoning and token in message.reasoning):
                    return token
        return None

    def _prepared(self, messages: Sequence[Message], *, add_system: bool = True) -> tuple[Message, ...]:
        written = tuple(self._with_reasoning(message) for message in messages)
        if add_system and self._system is not None and written[0].role != "system":
            return (self._system, *written)
        return written

    def _with_reasoning(self, message: Message) -> Message:
        """The message with its reasoning written into its text; the field stays for `_answer` to look for."""
        if message.reasoning is None or self._reasoning == "drop":
            return replace(message, reasoning=None)
        # As text and not as a `reasoning_content` field: templates that know reasoning find the tags,
        # the others write the text as it stands; in no case do the tags come twice.
        if self._reasoning == "plain":
            return replace(message, content=f"{message.reasoning}\n\n{message.content}")
        return replace(message, content=f"<think>\n{message.reasoning}\n</think>\n\n{message.content}")

    def _prefix(self, messages: Sequence[Message], *, check: bool = True) -> str:
        text = self._template.render(messages, generation_prompt=True)
        for message in messages if check else ():
            written = message.content.strip()
            quoted = json.dumps(written, ensure_ascii=False)[1:-1]  # some templates quote a tool's result
            if message.role != "assistant" and written not in text and quoted not in text:
                raise RefusedByTemplate(
                    f"the chat template does not write the {message.role} message as it stands"
                )
        return text

    def _turn(self, messages: tuple[Message, ...], source: Source) -> _Turn:
        """Encode the last message, an answer, behind those before it."""
        try:
            prefix = self._prefix(messages[:-1])
            full = self._template.render(messages, generation_prompt=False)
            answer = self._answer(prefix, full, messages[-1])
        except RefusedByTemplate as error:
            raise _bad(source, str(error)) from error
        prefix_ids = self._tokens(prefix, head=True)
        whole = self._tokens(prefix + answer, head=True)
        # Tokens that reach over the border can't be generated behind the prefix: split there.
        tail = whole[len(prefix_ids) :] if whole[: len(prefix_ids)] == prefix_ids else self._tokens(answer)
        return _Turn(prefix_ids, tail)

    def _answer(self, prefix: str, full: str, message: Message) -> str:
        """What `full` has behind `prefix`, up to the end of the stop token."""
        if not full.startswith(prefix):
            raise RefusedByTemplate(unlike_prompt(prefix, full))
        tail, end = full[len(prefix) :], self._template.turn_end
        if not tail.endswith(end):
            raise RefusedByTemplate(f"the chat template does not end this answer with {shorten(repr(end))}")
        answer = tail.removesuffix(end)
        if message.reasoning is not None and message.reasoning.strip() not in answer:
            raise RefusedByTemplate(
                "the chat template leaves the reasoning out: set data.reasoning to plain or drop, "
                "or data.chat_template"
            )
        # A template that knows reasoning looks for the tags and sets the text around them anew.
        if message.content.rpartition("</think>")[2].strip() not in answer:
            raise RefusedByTemplate("the chat template does not write the answer as it stands")
        return answer + self._stop_text

    def _find_stop(self) -> tuple[str, str]:
        """(stop token, the text from the end of an answer to the end of that token)."""
        end = self._template.turn_end
        found = min(((end.find(token), token) for token in self._special if token in end), default=None)
        if found is not None:
            return found[1], end[: found[0] + len(found[1])]
        eos = self._tokenizer.eos_token
        if eos is None:
            raise UserError(
                "the chat template ends an answer with no special token and the tokenizer has no EOS"
            )
        self.notes.append(f"{eos} is put after every answer: the chat template writes no stop token there")
        return eos, end.rstrip() + eos

    def _tokens(self, text: str, *, head: bool = False) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return self._bos + ids if head else ids

    def _fit(self, built: list[tuple[list[int], list[bool]]], source: Source) -> list[EncodedExample]:
        kept: list[EncodedExample] = []
        cut = 0
        for ids, mask in built:
            if any(mask[: self._max_length]):
                over = max(len(ids) - self._max_length, 0)
                kept.append(EncodedExample(ids[: self._max_length], mask[: self._max_length], source, over))
            else:
                cut += len(ids)
        if not kept:
            raise _bad(source, self._too_long(built[0][1].index(True), "the answer is"), CutOff)
        if cut:
            kept[-1] = replace(kept[-1], cut=kept[-1].cut + cut)
        return kept

    def _too_long(self, prompt: int, what: str) -> str:
        return (
            f"the prompt takes {prompt} tokens, so that {what} cut off altogether "
            f"(data.max_length: {self._max_length}); raise it or shorten the prompt"
        )


def _special_tokens(tokenizer: Any) -> tuple[str, ...]:
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    return tuple(dict.fromkeys((*added, *tokenizer.all_special_tokens)))


def _bad(source: Source, reason: str, kind: type[DataError] = DataError) -> DataError:
    return kind(f"{source.file}: 1 bad row:", [f"{source}: {reason}"])
