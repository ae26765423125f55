"""From the turns of a message list, in any of their spellings, to `Message`s in a valid order."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from qtrain.data.records import kind_of, shorten
from qtrain.data.rows import Message, Role


class RowError(ValueError):
    """Why a row can't be used; the caller knows its file and line."""


_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
_BEFORE: dict[Role, frozenset[str]] = {
    "user": frozenset({"start", "system", "assistant"}),
    "assistant": frozenset({"user", "tool"}),
    "tool": frozenset({"assistant", "tool"}),
}
_THINK = re.compile(r"\s*<think>\n?(.*?)\n?</think>\s*(.*)", re.DOTALL)


def text_of(value: object, name: str) -> str:
    """`value`, checked to be text with something in it that a tokenizer takes.

    Raises:
        RowError: it is missing (None), no string, blank, or holds half of a surrogate pair.
    """
    if not isinstance(value, str):
        hint = (
            " (a number must be quoted)"
            if isinstance(value, int | float) and not isinstance(value, bool)
            else ""
        )
        raise RowError(f"{name} is {kind_of(value)} and must be a string{hint}")
    if not value.strip():
        raise RowError(f"{name} is empty" if not value else f"{name} is blank")
    check_unicode(value, name)
    return value


def optional_text(value: object, name: str) -> str | None:
    """As `text_of`, but None and blank text, which csv and parquet write for an absent field, give None."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    return text_of(value, name)


def check_unicode(text: str, name: str) -> None:
    """Raise RowError where `text` can't be written as UTF-8 (JSON's `\\ud83d` without its other half)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise RowError(
            f"{name} holds half a character (lone surrogate \\u{code:04x}) at {error.start}"
        ) from None


def parse_messages(value: object, name: str) -> tuple[Message, ...]:
    """The turns of a list of {role, content} or {from, value} objects, their order not yet checked.

    Raises:
        RowError: with the number of the turn, from 1, and what is wrong with it.
    """
    if not isinstance(value, list | tuple):
        raise RowError(f"{name} is {kind_of(value)} and must be a list of turns")
    if not value:
        raise RowError(f"{name} is an empty list")
    return tuple(_parse_turn(turn, f"{name}: turn {number}") for number, turn in enumerate(value, start=1))


def _parse_turn(turn: object, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise RowError(f"{where} is {kind_of(turn)} and must be an object with 'role' and 'content'")
    role_key, content_key = ("from", "value") if turn.get("from") is not None else ("role", "content")
    if turn.get(role_key) is None:
        raise RowError(f"{where} has no 'role' (or 'from'); its keys are {_listed(turn)}")
    spelled = turn[role_key]
    role = _ROLES.get(spelled.lower()) if isinstance(spelled, str) else None
    if role is None:
        raise RowError(
            f"{where} has the unknown role {shorten(repr(spelled))} (known: {', '.join(sorted(_ROLES))})"
        )
    where = f"{where} ({role})"
    if turn.get("tool_calls"):
        raise RowError(f"{where} has 'tool_calls', which can't be learnt; write the call into 'content'")
    if content_key not in turn:
        raise RowError(f"{where} has no '{content_key}'; its keys are {_listed(turn)}")
    content = _content(turn[content_key], f"{where}: '{content_key}'", may_be_empty=role == "system")
    return make_message(role, content, _reasoning(turn, where), where)


def _content(value: object, name: str, *, may_be_empty: bool) -> str:
    if isinstance(value, list | tuple):
        value = "".join(_part_text(part, name) for part in value)
    if may_be_empty and value == "":
        return ""  # an empty system message keeps a template's default one away
    return text_of(value, name)


def _part_text(part: object, name: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else kind_of(part)
    raise RowError(f"{name} holds a part that is no text ({shorten(str(kind))})")


def _reasoning(turn: Mapping[str, Any], where: str) -> str | None:
    found = {
        key: optional_text(turn.get(key), f"{where}: '{key}'") for key in ("reasoning", "reasoning_content")
    }
    texts = {text for text in found.values() if text is not None}
    if len(texts) > 1:
        raise RowError(f"{where} has both 'reasoning' and 'reasoning_content', and they differ")
    return texts.pop() if texts else None


def make_message(role: Role, content: str, reasoning: str | None, where: str) -> Message:
    """A message; a <think> block at the head of an answer becomes its `reasoning`."""
    if role != "assistant":
        if reasoning is not None:
            raise RowError(f"{where} has reasoning, which only an assistant's turn can have")
        return Message(role, content)
    if (inline := _THINK.fullmatch(content)) is not None and inline[1].strip():
        if reasoning is not None:
            raise RowError(f"{where} has reasoning and a <think> block in its text as well")
        if not inline[2].strip():
            raise RowError(f"{where} has nothing after its <think> block")
        return Message(role, inline[2], inline[1])
    return Message(role, content, reasoning)


def check_order(messages: Sequence[Message], name: str) -> None:
    """Raise RowError unless the turns are [system] user assistant (tool assistant)* user assistant ...

    The last turn may be anyone's; an assistant's turn must be among them unless this is a prompt.
    """
    previous = "start"
    for number, message in enumerate(messages, start=1):
        if message.role == "system":
            if number > 1:
                raise RowError(f"{name}: turn {number} is a system message, which must stand first")
        elif previous not in _BEFORE[message.role]:
            raise RowError(f"{name}: {_out_of_order(message.role, previous, number)}")
        previous = message.role


def _out_of_order(role: str, previous: str, number: int) -> str:
    if role == previous:
        return f"turns {number - 1} and {number} are both the {role}'s (merge them, or add what is missing)"
    if previous in ("start", "system"):
        return f"the first turn is the {role}'s and must be the user's"
    return f"turn {number} is the {role}'s and can't follow the {previous}'s"


def _listed(turn: Mapping[str, Any]) -> str:
    return ", ".join(shorten(str(key), 30) for key in list(turn)[:8]) or "none"
