"""From a file or hub name to validated rows, one at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice

from qtrain.data.files import iter_records
from qtrain.data.formats import FORMATS, Format, detect, parse, unknown_format_reason
from qtrain.data.records import BadRow, Raw, Record, shorten, unreadable
from qtrain.data.rows import Row
from qtrain.data.turns import RowError
from qtrain.errors import DataError, UserError

ProblemHandler = Callable[[str, Raw], None]

_COUNTED_COLUMNS = 100  # names of other columns kept, so that ever new ones can't fill the memory
_PROBED_ROWS = 1000  # rows looked at before a file is said to be of no known format


def iter_rows(name: str, *, format: str = "auto", on_problem: ProblemHandler | None = None) -> Iterator[Row]:
    """The rows of a file (or of a hub data set `owner/name[:split]`), in order, read as they are asked for.

    Args:
        name: a .jsonl, .json, .csv or .parquet file, or a hub name.
        format: one of `formats.FORMATS`, or `auto`: that of the first row which shows one.
        on_problem: called with `file:line: reason` and the raw row for each bad one, which is then
            left out. Without it all bad rows are raised together after the last row.

    Raises:
        DataError: there are bad rows and no `on_problem`; or there is no row at all, none of a known
            format, rows of several formats, broken JSON behind which nothing can be read.
        UserError: there is no such file, or its kind is unknown.
    """
    return iter(RowReader(name, format=format, on_problem=on_problem))


def detect_format(name: str) -> tuple[str, str]:
    """(format, reason) of a file, from its first row which shows one; errors as `iter_rows`."""
    reader = RowReader(name)
    return reader.format.name, reader.reason


class RowReader:
    """One pass over the rows of a file; knows the format and why, and counts what it meets.

    Attributes:
        format, reason: what was detected or asked for.
        records: records met so far, bad ones included.
        bad: bad rows met so far.
        extra_columns: how often each column that is no part of the format was met.
    """

    def __init__(self, name: str, *, format: str = "auto", on_problem: ProblemHandler | None = None) -> None:
        self.name = name
        self.records = 0
        self.bad = 0
        self.extra_columns: Counter[str] = Counter()
        self._on_problem = on_problem
        self._problems: list[str] = []
        self._mixed = _FormatCounts(name)
        self._asked = format != "auto"
        self.format, self.reason = _asked_format(format) if self._asked else _probe(name)

    def __iter__(self) -> Iterator[Row]:
        for item in iter_records(self.name):
            self.records += 1
            if isinstance(item, BadRow):
                self._problem(item)
            else:
                yield from self._rows(item)
        if self.records == 0:
            raise unreadable(f"{self.name}: holds no rows")
        self.finish()

    def finish(self) -> None:
        """Raise DataError for what was wrong in the rows so far: for a pass that stops early."""
        self._mixed.check()
        if self._problems:
            raise DataError(f"{self.name}: {_count(len(self._problems))} of {self.records}:", self._problems)

    def _rows(self, record: Record) -> list[Row]:
        fmt = self.format
        if not self._asked and (found := detect(record.value)) is not None:
            self._mixed.add(found[0].name, record)
            if found[0] is not fmt:
                return []  # the whole file is refused at its end, with the count of each format
        if len(self.extra_columns) < _COUNTED_COLUMNS:
            self.extra_columns.update(shorten(key, 40) for key in fmt.extra(record.value))
        try:
            return parse(record, fmt)
        except RowError as error:
            self._problem(BadRow(record.source, str(error), record.value))
            return []

    def _problem(self, bad: BadRow) -> None:
        self.bad += 1
        if self._on_problem is None:
            self._problems.append(str(bad))
            return
        self._on_problem(str(bad), bad.raw)
        if bad.fatal:
            raise DataError(f"{self.name}: reading stopped at row {self.records}:", [str(bad)])


class MixedFormats(DataError):
    """Rows of several formats in one file."""


class _FormatCounts:
    """Counts the formats of a file's rows; more than one is an error."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._counts: Counter[str] = Counter()
        self._first: dict[str, Record] = {}

    def add(self, name: str, record: Record) -> None:
        self._counts[name] += 1
        if name not in self._first:
            self._first[name] = Record({}, record.source)

    def check(self) -> None:
        if len(self._counts) > 1:
            problems = [
                f"{self._first[name].source}: the first of {count} {name} row{'s' if count > 1 else ''}"
                for name, count in self._counts.items()
            ]
            raise MixedFormats(
                f"{self._name}: mixes {len(self._counts)} formats; put each into a file of its own "
                "(or name the one to read as data.format):",
                problems,
            )


def _asked_format(name: str) -> tuple[Format, str]:
    if name not in FORMATS:
        raise UserError(f"format '{name}' is unknown (known: auto, {', '.join(FORMATS)})")
    return FORMATS[name], f"{name}: asked for"


def _probe(name: str) -> tuple[Format, str]:
    """The format of the first row that shows one, among the first rows of the file."""
    seen: list[BadRow] = []
    for item in islice(iter_records(name), _PROBED_ROWS):
        if isinstance(item, BadRow):
            seen.append(item)
        elif (found := detect(item.value)) is not None:
            return found
        else:
            seen.append(BadRow(item.source, unknown_format_reason(item.value), ""))
    if not seen:
        raise unreadable(f"{name}: holds no rows")
    raise DataError(f"{name}: none of the first {len(seen)} rows can be used:", [str(bad) for bad in seen])


def _count(number: int) -> str:
    return "1 bad row" if number == 1 else f"{number} bad rows"
