"""The held-out rows of an evaluation: read, without repetitions, and looked for in the training rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtrain.data.dataset import Method, resolve_name
from qtrain.data.load import iter_rows
from qtrain.data.rows import Conversation, Message, PreferencePair, Row
from qtrain.errors import DataError, UserError

from .subject import Subject

LEAK_BYTES = 64 * 2**20  # training files up to this size are searched for held-out rows


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Rows that every subject of an evaluation answers."""

    conversations: list[Conversation]  # each with an assistant turn at its end
    pairs: list[PreferencePair]
    files: list[str]
    duplicates: int  # rows left out because another has the same messages

    @property
    def sha256(self) -> str:
        """Of the rows' messages and checks, in order."""
        digest = hashlib.sha256()
        rows: tuple[Row, ...] = (*self.conversations, *self.pairs)
        for row in rows:
            digest.update(f"{row_key(row)} {json.dumps(row.extra.get('check'), sort_keys=True)}\n".encode())
        return digest.hexdigest()


def collect(subjects: Sequence[Subject], data: Sequence[str], limit: int | None) -> HeldOut:
    """The rows of `data`, or else of all the runs' data.eval; `limit` holds for each kind of row.

    Raises:
        UserError: there are none.
        DataError: bad rows.
    """
    files = _files(subjects, data)
    if not files:
        names = ", ".join(subject.name for subject in subjects)
        raise UserError(
            f"{names}: no held-out rows (data.eval is empty); name a file with --data, or --data demo"
        )
    conversations: dict[str, Conversation] = {}
    pairs: dict[str, PreferencePair] = {}
    met = 0
    for file, format_ in files.items():
        for row in iter_rows(file, format=format_):
            met += 1
            if isinstance(row, PreferencePair):
                pairs.setdefault(row_key(row), row)
            else:
                conversations.setdefault(row_key(row), _ending_with_answer(row))
    return HeldOut(
        list(conversations.values())[:limit],
        list(pairs.values())[:limit],
        list(files),
        met - len(conversations) - len(pairs),
    )


def leaked(subject: Subject, rows: HeldOut) -> tuple[int, str | None]:
    """(held-out rows whose prompt is also in the subject's training rows, why that was not looked at)."""
    if subject.run is None:
        return 0, None
    files = [resolve_name(name, _method(subject), "train") for name in subject.data.train]
    missing = [name for name in files if not Path(name).is_file()]
    if missing:
        return 0, f"{missing[0]} is not on this machine"
    if sum(Path(name).stat().st_size for name in files) > LEAK_BYTES:
        return 0, f"the training files are over {LEAK_BYTES // 2**20} MiB"
    seen = {
        prompt_key(row)
        for name in files
        for row in iter_rows(name, format=subject.data.format, on_problem=lambda *_: None)
    }
    held_out: tuple[Row, ...] = (*rows.conversations, *rows.pairs)
    return sum(prompt_key(row) in seen for row in held_out), None


def prompt_of(row: Row) -> tuple[Message, ...]:
    """What the model is shown: everything before the last answer."""
    return row.messages[:-1] if isinstance(row, Conversation) else row.prompt


def reference_of(row: Row) -> str:
    """The answer that the data holds for good."""
    return (row.messages if isinstance(row, Conversation) else row.chosen)[-1].content


def row_key(row: Row) -> str:
    """Hash of all messages."""
    if isinstance(row, Conversation):
        return _hash(row.messages)
    return _hash(
        (*row.prompt, Message("assistant", "\0"), *row.chosen, Message("assistant", "\0"), *row.rejected)
    )


def prompt_key(row: Row) -> str:
    """Hash of the prompt, its system message left out."""
    return _hash([message for message in prompt_of(row) if message.role != "system"])


def _hash(messages: Sequence[Message]) -> str:
    flat: list[Any] = [[message.role, message.content, message.reasoning] for message in messages]
    return hashlib.sha256(json.dumps(flat).encode()).hexdigest()


def _ending_with_answer(row: Conversation) -> Conversation:
    """Turns behind the last answer have no reference."""
    last = max((n for n, message in enumerate(row.messages) if message.role == "assistant"), default=0)
    if last == 0:
        raise DataError(
            f"{row.source.file}: 1 bad row:", [f"{row.source}: has no assistant turn to compare with"]
        )
    return (
        row
        if last == len(row.messages) - 1
        else Conversation(row.messages[: last + 1], row.source, row.extra)
    )


def _files(subjects: Sequence[Subject], data: Sequence[str]) -> dict[str, str]:
    """File -> its format, in order, each once."""
    found: dict[str, str] = {}
    if data:
        for name in data:
            found.setdefault(resolve_name(name, "sft", "heldout"), "auto")
            found.setdefault(resolve_name(name, "dpo", "heldout"), "auto")  # another file for `demo` only
        return found
    for subject in subjects:
        if subject.run is not None:
            for name in subject.data.eval:
                found.setdefault(resolve_name(name, _method(subject), "heldout"), subject.data.format)
    return found


def _method(subject: Subject) -> Method:
    return "dpo" if subject.method == "dpo" else "sft"
