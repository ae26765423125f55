"""The manifest: everything that a run depended on and every choice that was made for it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from qtrain.cache import cache_folder

from .atomic import file_sha256

_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "bitsandbytes",
    "datasets",
    "triton",
    "tokenizers",
)


def versions() -> dict[str, str | None]:
    """Versions of what decides the arithmetic; None where a package is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("qtrain", *_PACKAGES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def git_commit() -> dict[str, Any] | None:
    """Commit and dirty flag of the work tree that this code lies in; None for an installed package."""
    folder = Path(__file__).resolve().parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *words], capture_output=True, text=True, check=False
            )
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    top = git("rev-parse", "--show-toplevel")
    if top is None or Path(top) / "qtrain" / "runs" != folder:
        return None  # a package inside of somebody else's work tree
    commit = git("rev-parse", "HEAD")
    return None if commit is None else {"commit": commit, "dirty": bool(git("status", "--porcelain"))}


def machine() -> dict[str, Any]:
    """The device and what it is called."""
    import torch

    found: dict[str, Any] = {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda": [],
    }
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found["cuda"].append(
            {
                "name": properties.name,
                "capability": f"sm_{properties.major}{properties.minor}",
                "memory_mib": properties.total_memory // 2**20,
            }
        )
    return found


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def base_hashes(folder: str) -> dict[str, str]:
    """SHA-256 of a local base model's configuration, tokenizer and weights, by file name.

    Hashes of files that have not changed since (size and time of change) are remembered beside the
    cache, so that a large model is not read again for every run. A hub name gives the resolved
    snapshot's files.
    """
    path = _local_folder(folder)
    if path is None:
        return {}
    wanted = sorted(
        file
        for file in path.iterdir()
        if file.suffix in (".safetensors", ".json", ".jinja", ".model", ".txt")
    )
    memory = _HashMemory()
    hashes = {file.name: memory.sha256(file) for file in wanted if file.is_file()}
    memory.save()
    return hashes


def _local_folder(folder: str) -> Path | None:
    if Path(folder).is_dir():
        return Path(folder)
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(folder, "config.json")
    return Path(cached).parent if isinstance(cached, str) else None


class _HashMemory:
    def __init__(self) -> None:
        self.path = cache_folder() / "file-hashes.json"
        try:
            self.known: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            self.known = {}

    def sha256(self, file: Path) -> str:
        stat = file.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        entry = self.known.get(str(file.resolve()))
        if entry is None or entry[:2] != stamp:
            entry = [*stamp, file_sha256(file)]
            self.known[str(file.resolve())] = entry
        return str(entry[2])

    def save(self) -> None:
        from .atomic import write_json

        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.known)


def adapter_hash(folder: Path) -> str:
    """One hash of an adapter's files."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.name in ("adapter_config.json", "adapter_model.safetensors"):
            digest.update(file_sha256(file).encode())
    return digest.hexdigest()


def provenance(command: Sequence[str] | None = None) -> dict[str, Any]:
    """When, by which command, with which code, on what."""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": list(command or sys.argv),
        "versions": versions(),
        "git": git_commit(),
        "machine": machine(),
    }
