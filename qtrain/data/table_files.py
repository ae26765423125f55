"""Readers of `.csv` and `.parquet` that hold a few rows at a time."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from qtrain.data.json_files import refuse_utf16
from qtrain.data.records import BadRow, Record, Records, StrictDecoder, escaped_byte, shorten, unreadable
from qtrain.data.rows import Source

# A quote that is never closed swallows the rest of the file into one field; this bounds it.
_LARGEST_FIELD = 1 << 28
_BATCH_ROWS = 64

# Columns that hold lists; a csv cell holds their JSON text.
_LIST_COLUMNS = frozenset({"messages", "conversations", "instances"})


def read_csv(path: Path) -> Records:
    """A header line, then one row a record; the line is the one where the record starts.

    Quoted fields may hold line breaks. Cells of list columns (`messages`) hold JSON.
    """
    csv.field_size_limit(max(csv.field_size_limit(), _LARGEST_FIELD))
    with path.open("rb") as probe:
        refuse_utf16(path, probe)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        header: list[str] | None = None
        while True:
            line = reader.line_num + 1
            source = Source(str(path), line)
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield BadRow(source, f"invalid CSV: {error}", "")
                continue
            if len(cells) <= 1 and not "".join(cells).strip():
                continue  # a blank line
            if header is None:
                header = _check_header(path, cells)
            else:
                yield _csv_record(header, cells, source)


def _check_header(path: Path, header: list[str]) -> list[str]:
    names = [name.strip() for name in header]
    if len(names) == 1 and ";" in names[0]:
        raise unreadable(
            f"{path}:1: the columns are separated by ';' and must be by ',': {shorten(names[0])}"
        )
    for name in names:
        if not name or names.count(name) > 1:
            what = f"names the column '{shorten(name)}' twice" if name else "has a column without a name"
            raise unreadable(f"{path}:1: the header {what}")
    return names


def _csv_record(header: list[str], cells: list[str], source: Source) -> Record | BadRow:
    raw = dict(zip(header, cells, strict=False))
    if len(cells) != len(header):
        return BadRow(source, f"has {len(cells)} cells where the header names {len(header)} columns", raw)
    row: dict[str, Any] = {}
    for name, cell in raw.items():
        if (invalid := escaped_byte(cell)) is not None:
            readable = {key: text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
                        for key, text in raw.items()}  # fmt: skip
            reason = f"invalid UTF-8: byte 0x{invalid[1]:02x} at offset {invalid[0]} of '{name}'"
            return BadRow(source, reason, readable)
        row[name] = cell
        if name in _LIST_COLUMNS and cell.strip():
            try:
                row[name] = StrictDecoder().decode(cell)
            except json.JSONDecodeError as error:
                return BadRow(
                    source, f"'{name}' holds invalid JSON at column {error.pos + 1}: {error.msg}", raw
                )
            except ValueError as error:
                return BadRow(source, f"'{name}' holds invalid JSON: {error}", raw)
    return Record(row, source)


def read_parquet(path: Path) -> Records:
    """The rows of a parquet file; the line is the row's number from 1."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        # pre_buffer would hold a whole row group: that is the file, for many writers.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, use_threads=False):
                for index in range(batch.num_rows):
                    number += 1
                    yield _parquet_record(batch.slice(index, 1), Source(str(path), number))
    except pa.ArrowException as error:
        raise unreadable(f"{path}: is damaged or no parquet file: {shorten(str(error), 120)}") from error


def _parquet_record(row: Any, source: Source) -> Record | BadRow:
    try:
        return Record(row.to_pylist()[0], source)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        reason = f"invalid UTF-8: byte 0x{byte:02x} at offset {error.start} of a field"
        return BadRow(source, reason, error.object)
