"""From what the user named to records: which reader a name needs, or why there is none."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from pathlib import Path

from qtrain.data.hub import read_hub
from qtrain.data.json_files import read_json, read_jsonl
from qtrain.data.records import Records
from qtrain.data.table_files import read_csv, read_parquet
from qtrain.errors import UserError

READERS: dict[str, Callable[[Path], Records]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
}
_KNOWN = ".jsonl, .json, .csv, .parquet"
_COMPRESSED = frozenset({".gz", ".bz2", ".xz", ".zst", ".zip"})
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.\[\]%:-]+)?")


def iter_records(name: str) -> Records:
    """The records of a local file or of a data set on the hub (`owner/name` or `owner/name:split`).

    Raises:
        UserError: `name` is neither; the file is missing, empty, compressed or of an unknown kind.
    """
    if is_hub_name(name):
        return read_hub(name)
    path = local_file(name)
    return READERS[path.suffix.lower()](path)


def is_hub_name(name: str) -> bool:
    """Whether `name` can only mean a data set on the hub: `owner/name`, and nothing of that path is here."""
    path = Path(name).expanduser()
    if path.exists() or not _HUB_NAME.fullmatch(name):
        return False
    return path.suffix.lower() not in {*READERS, *_COMPRESSED} and not path.parent.is_dir()


def local_file(name: str) -> Path:
    """The data file called `name`, checked to be there and readable by one of the readers."""
    path = Path(name).expanduser()
    if path.is_dir():
        inside = sorted(entry.name for entry in path.iterdir() if entry.suffix.lower() in READERS)
        hint = f"name a file in it, such as {path / inside[0]}" if inside else f"it holds no {_KNOWN} file"
        raise UserError(f"{name}: is a folder, not a data file; {hint}")
    if not path.exists():
        raise UserError(f"{name}: there is no such file{_nearest(path)}")
    suffix = path.suffix.lower()
    if suffix in _COMPRESSED:
        raise UserError(f"{name}: is compressed ('{suffix}'); unpack it first")
    if suffix not in READERS:
        raise UserError(f"{name}: unknown kind of file '{suffix}' (known: {_KNOWN})")
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise UserError(f"{name}: can't be read: {error.strerror}") from error
    return path


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor a folder {path.parent})"
    names = [entry.name for entry in path.parent.iterdir() if entry.suffix.lower() in READERS]
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {path.parent / close[0]}?"
    return "" if path.suffix else " (a data set on the hub is named owner/name)"
