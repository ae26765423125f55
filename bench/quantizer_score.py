"""How far quantised folders are from the 16-bit model on held-out windows, in float32 arithmetic.

KL(P || Q) of each position, P the 16-bit model; one figure for each window, so that intervals can be had
and folders be compared window by window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtrain.export.agreement import agreement
from qtrain.export.checkpoint import EMBEDDING, Checkpoint
from qtrain.export.streamed_model import StreamedModel

from .quantizer_read import QuantizedFolder

ROWS = 128  # positions whose logits are there at once, in float64


@dataclass(frozen=True, slots=True)
class Score:
    """Window by window, in the held-out windows' order.

    Attributes:
        kl: mean over the window's positions, nats.
        kl_max: of the window's worst position.
        top1: share of positions with the same likeliest token.
        log_perplexity_p, log_perplexity_q: of the 16-bit and of the quantised model, nats per token.
    """

    kl: list[float]
    kl_max: list[float]
    top1: list[float]
    log_perplexity_p: list[float]
    log_perplexity_q: list[float]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Judge:
    """The 16-bit model's hidden states on the held-out windows, against which folders are scored."""

    def __init__(self, model: Path, windows: Sequence[Sequence[int]]) -> None:
        self._folder, self._windows = model, windows
        checkpoint = Checkpoint.open(model)
        self._embedding = checkpoint.tensor(EMBEDDING).to(torch.float32)
        self._model = StreamedModel(
            model, lambda name: self._embedding if name == EMBEDDING else checkpoint.tensor(name)
        )
        self._states: list[Tensor] | None = None

    def score(self, folder: QuantizedFolder) -> Score:
        """Of one folder.

        Raises:
            ExportError: a tensor is missing or is no number.
        """
        if self._states is None:
            self._states = self._model.hidden_states(self._windows)
        other = StreamedModel(self._folder, folder.fetch)
        states = other.hidden_states(self._windows)
        score = Score([], [], [], [], [])
        for number, window in enumerate(self._windows):
            found = agreement(
                [window],
                (self._states[number : number + 1], self._model.logits),
                (states[number : number + 1], other.logits),
                rows=ROWS,
            )
            score.kl.append(found.kl)
            score.kl_max.append(found.kl_max)
            score.top1.append(found.top1)
            score.log_perplexity_p.append(math.log(found.perplexity_p))
            score.log_perplexity_q.append(math.log(found.perplexity_q))
        return score
