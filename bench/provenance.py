"""Where a figure came from: source, command, machine, versions."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

ROOM = Path(__file__).resolve().parent
PACKAGES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "triton", "numpy")

# of nvidia-smi --query-gpu
GPU_FIELDS = ("name", "driver_version", "memory.total", "power.limit", "clocks.max.sm", "clocks.max.memory")
GPU_STATE = ("clocks.sm", "clocks.memory", "temperature.gpu", "power.draw")


def provenance(packages: tuple[str, ...] = PACKAGES) -> dict[str, Any]:
    """Everything that a report states about itself, JSON-ready."""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "source": source_state(ROOM),
        "versions": package_versions(packages),
        "machine": machine(),
    }


def source_state(folder: Path) -> dict[str, Any]:
    """Commit and dirty flag of the checkout around `folder`; both None outside of one."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain"))}


def package_versions(packages: tuple[str, ...]) -> dict[str, str | None]:
    """Installed versions; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def machine() -> dict[str, Any]:
    """CPU model, the instructions that decide a matmul's speed, cores, memory, load; GPUs."""
    info = _read(Path("/proc/cpuinfo"))
    flags = _field(info, "flags").split()
    return {
        "system": platform.platform(),
        "cpu": _field(info, "model name") or platform.processor(),
        "cpu_features": sorted(set(flags) & {"avx2", "avx512f", "avx512_bf16", "amx_bf16", "avx512_fp16"}),
        "cores": os.cpu_count(),
        "memory": _field(_read(Path("/proc/meminfo")), "MemTotal"),
        "load": list(os.getloadavg()),
        "gpus": _nvidia_smi(GPU_FIELDS),
    }


def gpu_clocks() -> list[dict[str, str]]:
    """Clocks, temperature and power of each GPU at this moment; empty without nvidia-smi."""
    return _nvidia_smi(GPU_STATE)


def _nvidia_smi(fields: tuple[str, ...]) -> list[dict[str, str]]:
    """A dictionary for each GPU, values as nvidia-smi prints them."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return []
    if done.returncode != 0:
        return []
    lines = [line.split(", ") for line in done.stdout.splitlines() if line]
    return [dict(zip(fields, values, strict=True)) for values in lines if len(values) == len(fields)]


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False, timeout=30
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _read(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def _field(text: str, name: str) -> str:
    """The value of the first `name : value` line, or the empty string."""
    for line in text.splitlines():
        key, separator, value = line.partition(":")
        if separator and key.strip() == name:
            return value.strip()
    return ""
