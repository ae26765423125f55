"""The three things that a row of a data file can become."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a row came from; `str()` gives the `file:line` that every message about it starts with."""

    file: str
    line: int  # 1-based; for a format without lines (parquet, hub) the row's number

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `reasoning` is what an assistant thought before `content`; it is rendered by choice."""

    role: Role
    content: str
    reasoning: str | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns of which the assistant's are learnt."""

    messages: tuple[Message, ...]
    source: Source
    extra: Mapping[str, Any] = field(default_factory=dict)  # columns that are no part of the format


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """A prompt with a better and a worse continuation."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    source: Source
    extra: Mapping[str, Any] = field(default_factory=dict)


Row = Conversation | PreferencePair
