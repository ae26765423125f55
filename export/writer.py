"""A checkpoint folder that is there whole or not at all.

Everything is written to `<name>.partial` and renamed at the end; config.json, without which no reader takes a
folder for a model, comes last.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from .checkpoint import INDEX, WEIGHTS
from .disk import copy_file, disk_errors, flush_folder, sha256, write_bytes
from .errors import ExportError
from .tensors import Blocks, TensorSpec, Written, in_file_order, read_specs, write_tensors

MAX_SHARD = 4 * 10**9  # bytes
# beside the weights: tokenizer, templates, generation config, code that a tokenizer needs, licences
SIDE_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")
SIDE_NAMES = ("LICENSE", "NOTICE", "USE_POLICY")
NOT_COPIED = ("config.json", "quantize_config.json", "checksums.json", "manifest.json")


class CheckpointWriter:
    """Writes a checkpoint folder; a context manager.

        with CheckpointWriter(out) as writer:
            writer.write(specs, blocks)          # any number of times: split into shards
            writer.copy_shard(path)              # byte for byte
            writer.copy_side_files(base_folder)
            writer.seal(config)                  # names, index, config.json: a folder that readers can load
            ...                                  # measure writer.partial
            writer.publish()                     # or publish(rejected=True)

    Left without `publish`, by an error or a signal that Python sees, it removes what it wrote; killed, it
    leaves `<name>.partial`, which the next one removes.
    """

    def __init__(self, out: Path, *, max_shard_bytes: int = MAX_SHARD, force: bool = False) -> None:
        """
        Args:
            out: the folder to be made.
            max_shard_bytes: of tensors in one file; a larger tensor gets a file of its own.
            force: replace a folder that is there.

        Raises:
            ExportError: `out` exists and `force` is not set.
        """
        check_free(out, force=force)
        self.out = out
        self.partial = beside(out, "partial")
        self.max_shard_bytes = max_shard_bytes
        self.shards: list[tuple[Written, list[str]]] = []  # and the names of the tensors in it
        self.side_files: dict[str, str] = {}  # name -> sha256
        self.copied: dict[str, str] = {}  # shards copied as they were: source's name -> sha256
        self._force = force
        self._sealed = self._published = False

    def __enter__(self) -> CheckpointWriter:
        with disk_errors("the checkpoint", self.out):
            if self.partial.exists():
                shutil.rmtree(self.partial)
            self.partial.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._published:
            shutil.rmtree(self.partial, ignore_errors=True)

    def write(self, specs: Sequence[TensorSpec], blocks: Blocks) -> None:
        """Write tensors to as many new shards as they need; one block of them is in memory at a time.

        `blocks(spec)` gives a tensor's elements in order, in blocks of the spec's dtype.

        Raises:
            ExportError: the disk is full.
        """
        for part in split(specs, self.max_shard_bytes):
            path = self._next_path()
            with disk_errors("the checkpoint", self.out):
                written = write_tensors(path, in_file_order(part), blocks)
            self.shards.append((written, [spec.name for spec in part]))

    def copy_shard(self, source: Path) -> str:
        """Copy a weight file byte for byte; returns its SHA-256.

        Raises:
            ExportError: the disk is full.
        """
        names = list(read_specs(source))
        path = self._next_path()
        with disk_errors("the checkpoint", self.out):
            digest = copy_file(source, path)
        self.shards.append((Written(path, path.stat().st_size, digest), names))
        self.copied[source.name] = digest
        return digest

    def copy_side_files(self, source: Path, *, leave_out: Sequence[str] = ()) -> None:
        """Copy what stands beside the weights byte for byte: tokenizer, templates, generation config, code.

        Raises:
            ExportError: the disk is full.
        """
        for path in side_files(source):
            name = str(path.relative_to(source))
            if name not in leave_out:
                self.copy_as(path, name)

    def copy_as(self, source: Path, name: str) -> None:
        """Copy one file byte for byte under a name of its own."""
        target = self.partial / name
        with disk_errors(name, self.out):
            target.parent.mkdir(parents=True, exist_ok=True)
            self.side_files[name] = copy_file(source, target)

    def write_file(self, name: str, content: str | bytes) -> None:
        """Write a further file."""
        data = content.encode("utf-8") if isinstance(content, str) else content
        with disk_errors(name, self.out):
            write_bytes(self.partial / name, data)

    def write_json(self, name: str, value: Any) -> None:
        """Write a further JSON file."""
        self.write_file(name, json_text(value))

    def seal(self, config: dict[str, Any] | bytes) -> Path:
        """Give the shards their names, write index and config.json (bytes: as they are).

        Returns the folder, still under its partial name, that readers can load now.
        """
        names = self._name_shards()
        if len(names) > 1:
            weight_map = {
                tensor: name
                for name, (_, tensors) in zip(names, self.shards, strict=True)
                for tensor in tensors
            }
            self.write_json(
                INDEX,
                {"metadata": {"total_size": self._total()}, "weight_map": dict(sorted(weight_map.items()))},
            )
        self.write_file("config.json", config if isinstance(config, bytes) else json_text(config))
        self._sealed = True
        return self.partial

    def publish(self, *, rejected: bool = False) -> Path:
        """Rename the folder to its name, or to `<name>.rejected`; returns where it is.

        Raises:
            ExportError: it can't be renamed.
            RuntimeError: `seal` was not called.
        """
        if not self._sealed:
            raise RuntimeError("publish before seal")
        place = beside(self.out, "rejected") if rejected else self.out
        with disk_errors("the checkpoint", place):
            flush_folder(self.partial)
            replace_folder(self.partial, place)
        self._published = True
        return place

    def hashes(self) -> dict[str, str]:
        """SHA-256 of every weight file, by its name; after `seal`."""
        return {written.path.name: written.sha256 for written, _ in self.shards}

    def _next_path(self) -> Path:
        return self.partial / f"shard-{len(self.shards) + 1:05d}.safetensors"

    def _name_shards(self) -> list[str]:
        count = len(self.shards)
        names = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
        names = [WEIGHTS] if count == 1 else names
        for number, name in enumerate(names):
            written, tensors = self.shards[number]
            with disk_errors("the checkpoint", self.out):
                path = written.path.rename(self.partial / name)
            self.shards[number] = (Written(path, written.nbytes, written.sha256), tensors)
        return names

    def _total(self) -> int:
        return sum(spec.nbytes for written, _ in self.shards for spec in read_specs(written.path).values())


def beside(out: Path, what: str) -> Path:
    """`<name>.<what>` in the folder of `out`."""
    return out.with_name(f"{out.name}.{what}")


def check_free(out: Path, *, force: bool) -> None:
    """Refuse to write over what is there.

    Raises:
        ExportError: `out` exists and `force` is not set, or it or a folder above it is a file.
    """
    for place in (out, *out.parents):
        if place.is_file():
            raise ExportError(f"{place} is a file; name a folder with --out")
    if out.exists() and not force and any(out.iterdir()):
        raise ExportError(f"{out} exists already; --force replaces it, --out names another folder")


def split(specs: Sequence[TensorSpec], limit: int) -> list[list[TensorSpec]]:
    """Consecutive parts whose tensors have at most `limit` bytes; a larger tensor stands alone."""
    parts: list[list[TensorSpec]] = []
    used = 0
    for spec in specs:
        if not parts or used + spec.nbytes > limit:
            parts.append([])
            used = 0
        parts[-1].append(spec)
        used += spec.nbytes
    return parts


def side_files(folder: Path) -> list[Path]:
    """What stands beside a model's weights and goes with them, chat templates' folder included."""
    found = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and (path.suffix in SIDE_SUFFIXES or path.stem in SIDE_NAMES)
        and not path.name.startswith(".")
        and path.name not in NOT_COPIED
        and not path.name.endswith(".index.json")
    ]
    templates = folder / "additional_chat_templates"
    return found + (sorted(templates.glob("*.jinja")) if templates.is_dir() else [])


def replace_folder(partial: Path, place: Path) -> None:
    """Rename into place; what was there is gone only when the new folder has its name."""
    old = beside(place, "old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    partial.rename(place)
    flush_folder(place.parent)
    shutil.rmtree(old, ignore_errors=True)


def json_text(value: Any) -> str:
    """As transformers writes JSON: two spaces, a line break at the end."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def unchanged(path: Path, digest: str) -> bool:
    """Whether a file still has a SHA-256."""
    return path.is_file() and sha256(path) == digest
