"""Readers of `.jsonl` and `.json` that hold one row at a time, whatever the size of the file."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import BinaryIO

from qtrain.data.records import BadRow, Record, Records, StrictDecoder, as_record, escaped_byte, unreadable
from qtrain.data.rows import Source

_UTF8_BOM = codecs.BOM_UTF8
_CHUNK = 1 << 20  # bytes read at once
# Where a value is cut off by the end of the buffer, the decoder complains at most this far before it:
# the longest literal or escape that can be cut (`\\ud83d\\ude00`).
_CUT_MARGIN = 16


def read_jsonl(path: Path) -> Records:
    """One object a line. Blank lines are skipped; a bad line is yielded as such and reading goes on."""
    decoder = StrictDecoder()
    with path.open("rb") as file:
        refuse_utf16(path, file)
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(_UTF8_BOM)
            if text := line.strip(b" \t\r\n"):
                if number == 1 and text.startswith(b"["):
                    raise unreadable(
                        f"{path}:1: begins with '[', so this is a JSON array and not one object a line: "
                        f"rename it to {path.stem}.json"
                    )
                yield _decode_line(line.rstrip(b"\r\n"), Source(str(path), number), decoder)


def _decode_line(line: bytes, source: Source, decoder: StrictDecoder) -> Record | BadRow:
    try:
        value = decoder.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        reason = f"invalid UTF-8: byte 0x{line[error.start]:02x} at offset {error.start} of the line"
    except json.JSONDecodeError as error:
        reason = f"invalid JSON at column {error.pos + 1}: {error.msg}"
    except RecursionError:
        reason = "invalid JSON: nested too deeply"
    except ValueError as error:
        reason = f"invalid JSON: {error}"
    else:
        return as_record(value, source, line)
    return BadRow(source, reason, line)


def refuse_utf16(path: Path, file: BinaryIO) -> None:
    """Raise DataError for a file that starts with a UTF-16 mark, as some editors write."""
    head = file.read(2)
    file.seek(0)
    if head in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise unreadable(f"{path}: is UTF-16; save it as UTF-8 (iconv -f UTF-16 -t UTF-8 {path.name})")


def read_json(path: Path) -> Records:
    """An array of objects, one object, or objects one after the other.

    Broken JSON is a fatal bad row: where the next object starts can't be known.
    """
    with path.open("rb") as file:
        refuse_utf16(path, file)
        yield from _Scanner(path, file).values()


class _Scanner:
    """Walks over the text of a JSON file, holding the part from the current value on."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        # Invalid bytes become lone surrogates, so that only the row that holds them is bad.
        self._to_text = codecs.getincrementaldecoder("utf-8-sig")(errors="surrogateescape")
        self._decoder = StrictDecoder()
        self._text = ""
        self._at = 0  # position in _text of the next character
        self._line, self._column = 1, 1  # of _text[_at]
        self._finished = False

    def values(self) -> Records:
        in_array = self._peek() == "["
        if in_array:
            self._advance(1)
            if self._peek() == "]":
                self._advance(1)
                yield from self._expect_end()
                return
        while self._peek() or in_array:
            item = self._next_value()
            yield item
            if isinstance(item, BadRow) and item.fatal:
                return
            if in_array:
                separator = self._peek()
                if separator not in (",", "]"):
                    what = "the file ends inside the array" if not separator else "expected ',' or ']'"
                    yield self._fatal(what)
                    return
                self._advance(1)
                if separator == "]":
                    yield from self._expect_end()
                    return

    def _expect_end(self) -> Records:
        if self._peek():
            yield self._fatal("something follows the end of the array")

    def _fatal(self, what: str, offset: int = 0, raw: str = "") -> BadRow:
        before = self._text[self._at : self._at + offset]
        line = self._line + before.count("\n")
        column = offset - before.rfind("\n") if "\n" in before else self._column + offset
        reason = f"invalid JSON at column {column}: {what} (what follows can't be read)"
        return BadRow(Source(str(self._path), line), reason, raw, fatal=True)

    def _peek(self) -> str:
        """The next character that is not white space, "" at the end of the file."""
        while True:
            rest = self._text[self._at : self._at + 64]
            stripped = rest.lstrip(" \t\r\n")
            self._advance(len(rest) - len(stripped))
            if stripped:
                return stripped[0]
            if self._at == len(self._text) and not self._fill(_CHUNK):
                return ""

    def _advance(self, count: int) -> None:
        passed_to = self._at + count
        newlines = self._text.count("\n", self._at, passed_to)
        if newlines:
            self._line += newlines
            self._column = passed_to - self._text.rfind("\n", self._at, passed_to)
        else:
            self._column += count
        self._at = passed_to

    def _fill(self, size: int) -> bool:
        """Read `size` bytes more and forget what was passed; False at the end of the file."""
        if self._finished:
            return False
        data = self._file.read(size)
        self._finished = not data
        self._text = self._text[self._at :] + self._to_text.decode(data, final=self._finished)
        self._at = 0
        return not self._finished

    def _next_value(self) -> Record | BadRow:
        size = _CHUNK
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut_off = error.pos >= len(self._text) - _CUT_MARGIN or error.msg.startswith(
                    "Unterminated string"
                )
                # Doubling what is read keeps a row of many chunks linear.
                if cut_off and not self._finished:
                    self._fill(size)
                    size *= 2
                    continue
                return self._fatal(error.msg, error.pos - self._at, self._text[self._at : self._at + 10_000])
            except RecursionError:
                return self._fatal("nested too deeply")
            except ValueError as error:
                return self._fatal(str(error), 0, self._text[self._at : self._at + 10_000])
            if not isinstance(value, dict | list) and end == len(self._text) and self._fill(size):
                continue  # a number may go on behind the end of the buffer
            return self._take(value, end)

    def _take(self, value: object, end: int) -> Record | BadRow:
        raw = self._text[self._at : end]
        source = Source(str(self._path), self._line)
        self._advance(end - self._at)
        if (invalid := escaped_byte(raw)) is not None:
            offset, byte = invalid
            data = raw.encode("utf-8", "surrogateescape")
            line = source.line + data.count(b"\n", 0, offset)
            reason = f"invalid UTF-8: byte 0x{byte:02x} on line {line}, at offset {offset} of the row"
            return BadRow(source, reason, data)
        return as_record(value, source, raw)
