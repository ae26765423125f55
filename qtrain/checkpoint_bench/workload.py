"""What every engine is asked: the same tokens for each, and how often."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

ANSWER_BATCH = 16  # answers that are made at once
LEAST = 3
GATE_WINDOWS = 2  # on which an engine's perplexity is compared with ours


@dataclass(frozen=True)
class Workload:
    """Of one process.

    Attributes:
        windows: token ids; the first few are scored by the engine too.
        prompts: of the task; none where answers are not asked for.
        stop_ids: end an answer.
        max_new_tokens: of an answer.
        batches: requests at once, for each of which speed is measured.
        prompt_tokens, new_tokens: of a request for speed; one more token than `new_tokens` is made.
        samples: requests (of a batch) that are timed, behind one that warms up; fewer, but LEAST, where they
            have taken `budget_s`.
    """

    windows: Sequence[Sequence[int]]
    prompts: Sequence[Sequence[int]]
    stop_ids: Sequence[int]
    max_new_tokens: int
    batches: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    samples: int
    budget_s: float
    threads: int
    device: str
    timeout_s: float
    seed: int

    @cached_property
    def gate_windows(self) -> list[list[int]]:
        """Those that every engine scores."""
        return [list(window) for window in self.windows[:GATE_WINDOWS]]

    def requests(self, batch: int) -> list[list[list[int]]]:
        """[samples + 1][batch][tokens]: the windows' tokens in random order, so that no cache knows them."""
        draw = random.Random(f"{self.seed} {batch}")
        tokens = [token for window in self.windows for token in window]
        return [
            [draw.choices(tokens, k=self.prompt_tokens) for _ in range(batch)]
            for _ in range(self.samples + 1)
        ]

    def without_prompts(self) -> Workload:
        """For further processes: answers are greedy, once is enough."""
        return replace(self, prompts=[])

    def as_job(self) -> dict[str, Any]:
        """For a worker."""
        return {
            "windows": self.gate_windows,
            "prompts": [list(prompt) for prompt in self.prompts],
            "stop_ids": list(self.stop_ids),
            "max_new_tokens": self.max_new_tokens,
            "answer_batch": ANSWER_BATCH,
            "requests": [self.requests(batch) for batch in self.batches],
            "new_tokens": self.new_tokens,
            "least": LEAST,
            "budget_s": self.budget_s,
            "threads": self.threads,
            "device": self.device,
        }
