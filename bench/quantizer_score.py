"""How far quantised folders are from the 16-bit model on held-out windows, in float32 arithmetic.

KL(P || Q) of each position, P the 16-bit model; one figure for each window, so that intervals can be had
and folders be compared window by window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtrain.export.checkpoint import EMBEDDING, Checkpoint
from qtrain.export.streamed_model import StreamedModel

from .quantizer_read import QuantizedFolder

ROWS = 128  # positions whose logits are there at once


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
        for window, states_p, states_q in zip(self._windows, self._states, states, strict=True):
            ids = torch.tensor([*window, 0])
            parts = [
                _positions(
                    self._model.logits(states_p[first : first + ROWS]),
                    other.logits(states_q[first : first + ROWS]),
                    ids[first + 1 : first + ROWS + 1],
                )
                for first in range(0, len(window), ROWS)
            ]
            kl, same, log_p, log_q = torch.cat(parts, dim=1)  # [T] each; the last position has no next token
            score.kl.append(float(kl.mean()))
            score.kl_max.append(float(kl.max()))
            score.top1.append(float(same.mean()))
            score.log_perplexity_p.append(-float(log_p[:-1].mean()))
            score.log_perplexity_q.append(-float(log_q[:-1].mean()))
        return score


def _positions(logits_p: Tensor, logits_q: Tensor, following: Tensor) -> Tensor:
    """[4, M] float64: KL, whether the likeliest token is the same, log-probs of the next token by both.

    The logarithms are float32: a KL of 0.1 over 50k tokens is off by 1e-6 or so, windows differ by 1e-2.
    """
    log_p, log_q = logits_p.log_softmax(-1), logits_q.log_softmax(-1)  # [M, V]
    same = log_p.argmax(-1) == log_q.argmax(-1)
    targets = [values.gather(1, following[:, None])[:, 0] for values in (log_p, log_q)]
    kl = (log_p.exp() * log_q.neg_().add_(log_p)).sum(-1)
    return torch.stack([kl.double(), same.double(), *(values.double() for values in targets)])
