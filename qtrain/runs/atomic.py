"""Writing so that a killed process or a full disk leaves the last complete state, never half a file."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qtrain.errors import QtrainError

CHECKSUMS = "checksums.json"


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; rename it there when the block ends without an error."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        _sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file or nothing."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a whole JSON file or nothing."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def disk_errors(what: str, where: Path) -> Iterator[None]:
    """Turn a failed write into one line that says what was being written and how much room there is.

    torch and safetensors report a full disk as errors of their own, so the room that is left decides.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        free = shutil.disk_usage(_existing(where)).free
        wrote = "PytorchStreamWriter" in str(error) or isinstance(error, SafetensorError)
        if number in (errno.ENOSPC, errno.EDQUOT) or (wrote and free < 2**24):
            raise QtrainError(
                f"disk full while writing {what} to {where} ({free / 2**20:.0f} MiB free); free some space"
            ) from error
        if isinstance(error, OSError):
            raise QtrainError(f"can't write {what} to {where}: {error.strerror or error}") from error
        raise


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _digest(file)
        )


def _digest(file: Any) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no file_digest
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()


def write_checksums(folder: Path) -> None:
    """Record the size and SHA-256 of every file of a folder in its checksums.json."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    sums = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in files
    }
    for path in files:
        _sync(path)
    write_text(folder / CHECKSUMS, _sums_text(sums))


def _sums_text(sums: dict[str, Any]) -> str:
    """The table with a digest of its own, so that damage to it is seen as well."""
    digest = hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()
    return json.dumps({"files": sums, "sha256_of_files": digest}, indent=2, ensure_ascii=False) + "\n"


def damage(folder: Path) -> str | None:
    """What is wrong with a folder that `write_checksums` was called for, or None."""
    table = folder / CHECKSUMS
    try:
        text = table.read_bytes().decode("utf-8")
        sums = json.loads(text)["files"]
        whole = text == _sums_text(sums)
    except FileNotFoundError:
        return f"{table} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{table} can't be read: {error}"
    if not whole:
        return f"{table} has changed since it was written"
    for name, entry in sums.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{path} is {path.stat().st_size} bytes, {entry['bytes']} were written"
        if file_sha256(path) != entry["sha256"]:
            return f"{path} has changed since it was written (SHA-256 differs)"
    return None


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
