"""Talking to a run or a base model, token by token."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from qtrain.data.rows import Message
from qtrain.data.template import ChatEncoder
from qtrain.errors import UserError
from qtrain.model.load import Base

from .evaluate import speaker
from .figures import printable
from .generate import decode_steps, decode_text, sampler
from .score import make_encoder, stop_ids
from .subject import Subject, adapted, find_subject, open_base

_HALF_CHARACTER = "\N{REPLACEMENT CHARACTER}"  # what a token that ends inside a character decodes to


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """How answers are made."""

    system: str | None = None
    max_new_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0


@dataclass(slots=True)
class Chat:
    """A conversation so far, and what answers it."""

    model: Any
    base: Base
    encoder: ChatEncoder
    settings: ChatSettings
    messages: list[Message]
    answers: int = 0

    def stream(self, question: str) -> Generator[str, None, None]:
        """Answer `question` piece by piece; both are remembered, a stopped answer as far as it came.

        Raises:
            UserError: the conversation is longer than the model can read.
        """
        self.messages.append(Message("user", question))
        prompt = self.encoder.encode_prompt(self.messages)
        room = _context(self.base) - len(prompt)
        if room < 1:
            self.messages.pop()
            raise UserError(
                f"the conversation is {len(prompt)} tokens, the model reads {_context(self.base)}; /reset"
            )
        stops = stop_ids(self.base, self.encoder)
        ids: list[int] = []
        shown = 0  # characters
        pick = sampler(self.settings.temperature, self.settings.seed + self.answers)
        self.answers += 1
        steps = decode_steps(
            self.model, [prompt], stops, pick, max_new_tokens=min(self.settings.max_new_tokens, room)
        )
        try:
            for ((_, token),) in steps:
                if token not in stops:
                    ids.append(token)
                text = decode_text(self.base.tokenizer, ids)
                whole = text.removesuffix(_HALF_CHARACTER)
                if len(whole) > shown:
                    yield whole[shown:]
                    shown = len(whole)
            yield decode_text(self.base.tokenizer, ids)[shown:]
        finally:
            self.messages.append(Message("assistant", decode_text(self.base.tokenizer, ids)))

    def reset(self) -> None:
        """Forget everything but the system message."""
        del self.messages[1 if self.settings.system is not None else 0 :]


def answer_once(name: str, question: str, settings: ChatSettings, console: Console) -> None:
    """Print the answer to one question; notes go to stderr, so that the answer can be piped on."""
    subject = find_subject(name)
    base = open_base(subject, speaker(Console(stderr=True)))
    with adapted(base, subject) as model:
        for piece in _chat(model, base, subject, settings).stream(question):
            _write(console, piece)
    console.print()


def converse(name: str, settings: ChatSettings, console: Console) -> None:
    """Read questions from the terminal until /exit or Ctrl-D."""
    subject = find_subject(name)
    say = speaker(console)
    say(f"loading {name}")
    base = open_base(subject, say)
    with adapted(base, subject) as model:
        chat = _chat(model, base, subject, settings)
        say("/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer")
        while (question := _ask(console)) is not None:
            if question == "/reset":
                chat.reset()
                say("forgotten")
            elif question.startswith("/"):
                say(f"{question.split()[0]} is no command; there are /reset and /exit")
            elif question:
                _answer(chat, question, console)


def _answer(chat: Chat, question: str, console: Console) -> None:
    pieces = chat.stream(question)
    try:
        for piece in pieces:
            _write(console, piece)
    except KeyboardInterrupt:
        console.print(" [dim](stopped)[/dim]", end="")
    except UserError as error:
        console.print(str(error), style="red", markup=False, end="")
    finally:
        pieces.close()  # remembers what was said
    console.print()


def _ask(console: Console) -> str | None:
    """A line from the terminal; None to leave."""
    try:
        line = console.input("[bold cyan]>[/bold cyan] ").strip()
    except EOFError:
        console.print()
        return None
    except KeyboardInterrupt:
        console.print()
        return ""
    return None if line in ("/exit", "/quit") else line


def _chat(model: Any, base: Base, subject: Subject, settings: ChatSettings) -> Chat:
    messages = [] if settings.system is None else [Message("system", settings.system)]
    return Chat(model, base, make_encoder(base, subject.data), settings, messages)


def _context(base: Base) -> int:
    config = base.model.config.get_text_config(decoder=True)
    return int(getattr(config, "max_position_embeddings", None) or 2**20)


def _write(console: Console, text: str) -> None:
    console.file.write(printable(text) if console.is_terminal else text)
    console.file.flush()
