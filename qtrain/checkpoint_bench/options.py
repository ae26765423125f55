"""What the command line of `qtrain bench checkpoints` says."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from qtrain.bench.peers.environments import CACHE
from qtrain.export_command.rows import Windows

from .engines import NAMES, Name
from .task import Task
from .workload import Workload


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    folders: list[Path] = field(default_factory=list)
    engines: tuple[Name, ...] = NAMES
    data: list[str] = field(default_factory=list)
    limit: int = 40
    max_new_tokens: int | None = None
    rows: int = 8
    tokens: int = 512
    gate: str | None = None
    batch: int = 4
    prompt_tokens: int = 128
    new_tokens: int = 32
    samples: int = 15
    budget_s: float = 60
    rounds: int = 2
    threads: int = 2
    timeout_s: float = 3600
    device: str = "auto"
    seed: int = 0
    cache: Path = CACHE

    @property
    def place(self) -> str:
        """The device that engines run on."""
        if self.device != "auto":
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"

    def work(self, windows: Windows, task: Task | None) -> Workload:
        """For the engines."""
        return Workload(
            windows=windows.ids,
            prompts=[] if task is None else task.prompts,
            stop_ids=[] if task is None else task.stop_ids,
            max_new_tokens=0 if task is None else task.max_new_tokens,
            batches=tuple(dict.fromkeys((1, self.batch))),
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens,
            samples=self.samples,
            budget_s=self.budget_s,
            threads=self.threads,
            device=self.place,
            timeout_s=self.timeout_s,
            seed=self.seed,
        )
