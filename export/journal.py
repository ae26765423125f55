"""What an export has finished so far, on disk, so that a killed one goes on where it was.

    <name>.journal/journal.jsonl   first line: the key; then a line for each entry, appended and flushed
    <name>.journal/<entry>.safetensors

An entry counts when its line is whole and its file has the SHA-256 that the line says: a kill at any moment
leaves entries that are complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from .disk import disk_errors, flush_folder, sha256
from .errors import ExportError
from .tensors import TensorSpec, read_specs, write_whole
from .writer import beside

LINES = "journal.jsonl"


@dataclass(frozen=True, slots=True)
class Entry:
    """A finished part."""

    file: str
    nbytes: int
    sha256: str
    notes: dict[str, Any]


class Journal:
    """Finished parts of an export by name (a decoder layer each, say): tensors and notes.

    Raises:
        ExportError: there is a journal and `resume` is not set, or it was begun with another key.
    """

    def __init__(
        self, out: Path, key: Mapping[str, Any], *, resume: bool = False, force: bool = False
    ) -> None:
        """
        Args:
            out: the folder that is being exported to; the journal lies beside it.
            key: everything that the entries depend on (options, hashes, seed); JSON values.
            resume: go on with the journal that is there; without one, begin.
            force: begin anew although there is one.
        """
        self.folder = beside(out, "journal")
        self._key = json.loads(json.dumps(key))
        self._entries: dict[str, Entry] = {}
        self.dropped: list[str] = []  # entries whose file was not what its line says
        if (self.folder / LINES).is_file() and not force:
            self._go_on(resume)
        else:
            self._begin()

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        """The finished parts, in the order in which they were saved."""
        return list(self._entries)

    def save(self, name: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any] | None = None) -> None:
        """Add or replace an entry; it is on disk when this returns.

        Raises:
            ExportError: the disk is full.
        """
        file = f"{name}.safetensors"
        partial = self.folder / f"{file}.partial"
        with disk_errors(f"the journal's {name}", self.folder):
            written = write_whole(partial, tensors)
            partial.rename(self.folder / file)
            flush_folder(self.folder)
            entry = Entry(file, written.nbytes, written.sha256, json.loads(json.dumps(dict(notes or {}))))
            self._append(
                {
                    "name": name,
                    "file": file,
                    "bytes": entry.nbytes,
                    "sha256": entry.sha256,
                    "notes": entry.notes,
                }
            )
        self._entries.pop(name, None)
        self._entries[name] = entry

    def drop(self, name: str) -> None:
        """Forget an entry and its file; nothing happens where there is none."""
        entry = self._entries.pop(name, None)
        if entry is not None:
            with disk_errors(f"the journal's {name}", self.folder):
                self._append({"name": name, "dropped": True})
                (self.folder / entry.file).unlink(missing_ok=True)

    def specs(self, name: str) -> dict[str, TensorSpec]:
        """What an entry's tensors are."""
        return read_specs(self.folder / self._entries[name].file)

    def load(self, name: str) -> dict[str, Tensor]:
        """An entry's tensors, in memory of their own."""
        with safe_open(self.folder / self._entries[name].file, framework="pt") as file:
            return {tensor: file.get_tensor(tensor).clone() for tensor in file.keys()}  # noqa: SIM118

    def tensor(self, name: str, tensor: str) -> Tensor:
        """One of an entry's tensors, in memory of its own."""
        with safe_open(self.folder / self._entries[name].file, framework="pt") as file:
            return file.get_tensor(tensor).clone()

    def notes(self, name: str) -> dict[str, Any]:
        """What was saved with an entry besides tensors."""
        return dict(self._entries[name].notes)

    def remove(self) -> None:
        """The export is done: the journal goes."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _begin(self) -> None:
        with disk_errors("the journal", self.folder):
            if self.folder.exists():
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True)
            self._append({"key": self._key})

    def _go_on(self, resume: bool) -> None:
        lines = _whole_lines(self.folder / LINES)
        begun = lines[0].get("key") if lines else None
        if begun is None:  # killed before its first line was whole
            self._begin()
            return
        if not resume:
            raise ExportError(
                f"{self.folder} holds an unfinished export; go on with it: --resume, or begin anew: --force"
            )
        changed = [name for name in {**begun, **self._key} if begun.get(name) != self._key.get(name)]
        if changed:
            told = ", ".join(
                f"{name} {begun.get(name)!r} -> {self._key.get(name)!r}" for name in sorted(changed)
            )
            raise ExportError(
                f"--resume: {self.folder} was begun differently ({told}); "
                "give the same options, or begin anew: --force"
            )
        self._read(lines[1:])

    def _read(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            name = str(line["name"])
            self._entries.pop(name, None)
            if "file" in line:
                self._entries[name] = Entry(line["file"], line["bytes"], line["sha256"], line["notes"])
        for name, entry in list(self._entries.items()):
            path = self.folder / entry.file
            if not path.is_file() or path.stat().st_size != entry.nbytes or sha256(path) != entry.sha256:
                self.dropped.append(name)
                del self._entries[name]

    def _append(self, line: Mapping[str, Any]) -> None:
        path = self.folder / LINES
        _end_torn_line(path)
        with path.open("ab") as file:
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """A line that a kill cut off ends the journal's knowledge, not the journal."""
    found = []
    for line in path.read_bytes().split(b"\n"):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def _end_torn_line(path: Path) -> None:
    if path.is_file() and (size := path.stat().st_size):
        with path.open("rb+") as file:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                file.write(b"\n")
