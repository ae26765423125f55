"""The text side of a chat template: finding it, rendering with it, and what it writes after an answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qtrain.data.records import shorten
from qtrain.data.rows import Message
from qtrain.errors import UserError

# `{turn_end}` becomes a token that the tokenizer has: <|im_end|>, or else its EOS.
_CHATML = (
    "{bos}{{% for message in messages %}}"
    "{{{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + {turn_end} + '\\n' }}}}"
    "{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\\n' }}}}{{% endif %}}"
)
_PROBE = "8b1c5e"  # an answer that no template contains, splits or changes


class RefusedByTemplate(UserError):
    """The template raised, or leaves out what it was given; the caller knows the row."""


class ChatTemplate:
    """A tokenizer's chat template, or another one in its place.

    Attributes:
        source: the Jinja text.
        turn_end: what the template writes after an answer's text, such as "<|im_end|>" and a line break.
        notes: choices made here that a user should know of.

    Raises:
        UserError: there is no template, the file of one is missing, or it can't be used.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None) -> None:
        self._tokenizer = tokenizer
        self.notes: list[str] = []
        self.source = self._find(chat_template)
        if "strftime_now" in self.source:
            self.notes.append("the chat template writes today's date: the tokens differ from day to day")
        self.turn_end = self._turn_end()

    def render(self, messages: Sequence[Message], *, generation_prompt: bool) -> str:
        """The text of `messages`, and with `generation_prompt` the head of the assistant's next turn.

        Raises:
            RefusedByTemplate: the template raises an error for these messages.
        """
        import jinja2

        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text: str = self._tokenizer.apply_chat_template(
                turns,
                chat_template=self.source,
                add_generation_prompt=generation_prompt,
                tokenize=False,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:  # a template is a program
            raise RefusedByTemplate(f"the chat template refuses it: {shorten(str(error), 160)}") from error
        return text

    def _find(self, asked: str | None) -> str:
        own = self._tokenizer.chat_template
        if asked is None:
            if not own:
                raise UserError(
                    "the tokenizer has no chat template: for a run, set data.chat_template to chatml or to a "
                    "Jinja file; to measure or export a model, put a chat_template.jinja into its folder"
                )
            try:
                return str(self._tokenizer.get_chat_template())
            except ValueError as error:  # several named templates and no default
                raise UserError(f"the tokenizer's chat template is ambiguous: {error}") from error
        if own:
            self.notes.append(f"data.chat_template: {asked} replaces the tokenizer's own chat template")
        if asked == "chatml":
            return chatml(self._tokenizer)
        path = Path(asked).expanduser()
        if not path.is_file():
            raise UserError(f"data.chat_template: '{asked}' is neither chatml nor a Jinja file that exists")
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"data.chat_template: {asked} is no UTF-8 text") from error

    def _turn_end(self) -> str:
        ask = Message("user", "a")
        try:
            prompt = self.render((ask,), generation_prompt=True)
            text = self.render((ask, Message("assistant", _PROBE)), generation_prompt=False)
        except RefusedByTemplate as error:
            raise UserError(f"the chat template can't be used: {error}") from error
        if text.count(_PROBE) != 1:
            raise UserError(
                f"the chat template writes an answer {text.count(_PROBE)} times and must do so once"
            )
        if not text.startswith(prompt):
            raise UserError(unlike_prompt(prompt, text))
        before, _, after = text[len(prompt) :].partition(_PROBE)
        if before.strip():
            self.notes.append(
                f"the chat template writes {shorten(repr(before))} before an answer without reasoning; "
                "it is learnt as part of the answer"
            )
        return after


def unlike_prompt(prompt: str, text: str) -> str:
    """Why `text`, a conversation with its answer, can't be what a model given `prompt` would continue."""
    shared = next((i for i, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), len(text))
    return (
        f"the chat template's prompt for an answer goes on with {shorten(repr(prompt[shared:]), 50)}, which "
        "is not what it writes before the answer itself: set data.chat_template to chatml or to a "
        "corrected Jinja file"
    )


def chatml(tokenizer: Any) -> str:
    """ChatML as a Jinja template, with turn ends and BOS as this tokenizer has them."""
    has_im_end = "<|im_end|>" in tokenizer.get_vocab()
    turn_end = "'<|im_end|>'" if has_im_end else "eos_token"
    return _CHATML.format(turn_end=turn_end, bos="{{ bos_token }}" if adds_bos(tokenizer) else "")


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts its BOS before plain text by itself."""
    if tokenizer.bos_token_id is None:
        return False
    ids = tokenizer("a").input_ids
    return bool(ids) and ids[0] == tokenizer.bos_token_id
