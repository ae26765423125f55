"""What a reader yields: a record, or a bad row with the reason why it is none."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qtrain.data.rows import Source
from qtrain.errors import DataError

Raw = str | bytes | dict[str, Any]

_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")


@dataclass(frozen=True, slots=True)
class Record:
    """One object of a data file, not yet looked into."""

    value: dict[str, Any]
    source: Source


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that can't be used. `str()` gives `file:line: reason`.

    `fatal`: the reader can't find the next row, so that what follows in the file is lost too.
    """

    source: Source
    reason: str
    raw: Raw
    fatal: bool = False

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


def shorten(text: str, width: int = 60) -> str:
    """`text` on one line of at most `width` characters, control characters escaped."""
    head = (
        text[: width + 1].encode("unicode_escape").decode("ascii")
        if not text[: width + 1].isprintable()
        else text
    )
    return head if len(text) <= width and len(head) <= width else head[: width - 3] + "..."


def kind_of(value: object) -> str:
    """What JSON calls the type of `value`, with its article."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    if isinstance(value, dict):
        return "an object"
    return (
        "a list" if isinstance(value, list | tuple) else names.get(type(value), f"a {type(value).__name__}")
    )


def escaped_byte(text: str) -> tuple[int, int] | None:
    """(offset in bytes, value) of the first invalid byte in `text`, decoded with `surrogateescape`."""
    if text.isascii() or (found := _ESCAPED_BYTE.search(text)) is None:
        return None
    return len(text[: found.start()].encode("utf-8", "surrogateescape")), ord(found.group()) - 0xDC00


def unreadable(message: str) -> DataError:
    """The error of a file which as a whole can't be used; `message` begins with its name."""
    return DataError(message, [])


class StrictDecoder(json.JSONDecoder):
    """JSON as the standard has it: NaN, Infinity and a key that stands twice are errors.

    Raises:
        ValueError: as `json.JSONDecoder`, and for the cases above.
    """

    def __init__(self) -> None:
        super().__init__(parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON (use null or leave the key out)")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key '{shorten(twice)}' stands twice in one object")
    return result


def as_record(value: object, source: Source, raw: Raw) -> Record | BadRow:
    """A record of a decoded JSON value; anything but an object is a bad row."""
    if isinstance(value, dict):
        return Record(value, source)
    return BadRow(source, f"a row must be an object with named fields, this one is {kind_of(value)}", raw)


Records = Iterator[Record | BadRow]
