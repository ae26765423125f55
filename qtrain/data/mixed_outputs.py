"""Finds instructions whose answers are JSON in some rows and free text in others."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from hashlib import blake2b

from qtrain.data.records import shorten
from qtrain.data.rows import Message, Source

_HEAD = 200  # characters of an instruction by which it is known
_COUNT_AT = 42  # bit of a packed count: two bits of kind and forty of line below it


_KINDS = ("JSON", "free text", "broken JSON")


@dataclass(slots=True)
class MixedInstruction:
    """An instruction with answers of several kinds."""

    head: str
    is_system: bool
    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, Source] = field(default_factory=dict)  # kind of answer -> where it stands first

    @property
    def place(self) -> Source:
        """Where the rarest kind of answer stands first."""
        return self.first[min(self.counts, key=lambda kind: self.counts[kind])]

    def __str__(self) -> str:
        what = "the system message" if self.is_system else "the instruction"
        kinds = [f"{kind} {count} x (line {self.first[kind].line})" for kind, count in self.counts.items()]
        return f"{what} {shorten(repr(self.head))} is answered with {', '.join(kinds)}"


class MixedOutputs:
    """Groups the answers of a file by the head of what the user asked and by the system message.

    An instruction whose answers are all of one kind costs two integers, so that a large file of ever
    new instructions stays within bounds.
    """

    def __init__(self) -> None:
        self._uniform: dict[int, int] = {}  # instruction -> count, first line and kind of its answers, packed
        self._mixed: dict[int, MixedInstruction] = {}

    def add(self, prompt: tuple[Message, ...], answer: str, source: Source) -> None:
        """Take the answer to `prompt` into account."""
        kind = _KINDS.index(answer_kind(answer))
        asked = [message.content for message in prompt if message.role == "user"]
        if asked:
            self._add(instruction_head(asked[-1]), False, kind, source)
        if prompt[0].role == "system":
            self._add(prompt[0].content, True, kind, source)

    def found(self, *, is_system: bool) -> list[MixedInstruction]:
        """System messages, or instructions, with answers of several kinds, in the order of discovery."""
        return [mixed for mixed in self._mixed.values() if mixed.is_system == is_system]

    def _add(self, text: str, is_system: bool, kind: int, source: Source) -> None:
        digest = blake2b(text.encode(), digest_size=7, salt=b"system" if is_system else b"user")
        key = int.from_bytes(digest.digest(), "little")
        if (mixed := self._mixed.get(key)) is None:
            packed = self._uniform.get(key, source.line << 2 | kind)
            if packed & 3 == kind:
                self._uniform[key] = packed + (1 << _COUNT_AT)
                return
            mixed = self._mixed[key] = MixedInstruction(text[:_HEAD], is_system)
            before = _KINDS[packed & 3]
            mixed.counts[before] = packed >> _COUNT_AT
            mixed.first[before] = Source(source.file, (packed >> 2) & ((1 << (_COUNT_AT - 2)) - 1))
            del self._uniform[key]
        mixed.counts[_KINDS[kind]] += 1
        mixed.first.setdefault(_KINDS[kind], source)


def answer_kind(answer: str) -> str:
    """`JSON` for an answer that is one JSON object or array; `broken JSON` where it only begins so."""
    text = answer.strip()
    if not (text.startswith(("{", "[")) and text.endswith(("}", "]"))):
        return "broken JSON" if text.startswith(('{"', '[{"')) else "free text"
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        # [Verse 1] ... [End] is prose; what opens like an object with a key was meant as JSON
        return "broken JSON" if text.startswith(('{"', '[{"', "{\n", "[\n")) else "free text"
    return "JSON"


def instruction_head(text: str) -> str:
    """The first paragraph of a user's message, every digit as 0: what is asked, as opposed to the data."""
    head = text.strip().replace("\r\n", "\n").partition("\n\n")[0][:_HEAD]
    return "".join("0" if char.isdigit() else char for char in head)
