"""Files that are whole or not there, and one line when there is no room for them."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from .errors import ExportError

BLOCK = 2**22  # bytes read at once


@contextlib.contextmanager
def disk_errors(what: str, where: Path) -> Iterator[None]:
    """Turn a failed write below `where` into one line that says what was being written.

    Raises:
        ExportError: the disk is full, or the folder can't be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ExportError(
                f"disk full while writing {what} to {where} ({size_text(free_bytes(where))} free); "
                "free some space, or name another disk with --out"
            ) from error
        raise ExportError(f"can't write {what} to {where}: {error.strerror or error}") from error


def free_bytes(where: Path) -> int:
    """Room on the disk that a path (which need not exist) is on."""
    place = where.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def check_room(needed: int, where: Path) -> None:
    """Refuse an export that can't fit, before anything is written.

    Raises:
        ExportError: says how much is needed and how much is free.
    """
    free = free_bytes(where)
    if needed > free:
        raise ExportError(
            f"{where} needs {size_text(needed)}, and its disk has {size_text(free)} free; "
            "free some space, or name another disk with --out"
        )


def size_text(size: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")


def parse_size(text: str) -> int:
    """'4GB' -> 4_000_000_000, '500MiB' -> 524_288_000; a plain number is bytes.

    Raises:
        ExportError: no such size.
    """
    units = {"": 1, "B": 1} | {
        f"{letter}{tail}": base**power
        for power, letter in enumerate("KMGT", start=1)
        for tail, base in (("B", 1000), ("", 1000), ("IB", 1024))
    }
    number = text.strip().upper()
    digits = number.rstrip("BIKMGT ")
    unit = number[len(digits) :].strip()
    try:
        size = int(float(digits) * units[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise ExportError(f"'{text}' is no size; write it like 4GB, 500MB or 2GiB")
    return size


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def copy_file(source: Path, target: Path) -> str:
    """Copy a file's bytes, on disk when this returns; its SHA-256, of the bytes that were read."""
    digest = hashlib.sha256()
    with source.open("rb") as read, target.open("wb") as write:
        while block := read.read(BLOCK):
            digest.update(block)
            write.write(block)
        flush(write.fileno())
    return digest.hexdigest()


def write_bytes(target: Path, content: bytes) -> None:
    """Write a file, on disk when this returns."""
    with target.open("wb") as file:
        file.write(content)
        file.flush()
        flush(file.fileno())


def flush(descriptor: int) -> None:
    """Have a file's bytes on the disk."""
    os.fsync(descriptor)


def flush_folder(folder: Path) -> None:
    """Have a folder's names on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
