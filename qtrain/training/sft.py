"""Supervised fine-tuning: the negative log-likelihood of the supervised tokens."""

from __future__ import annotations

import math

from torch import Tensor, nn

from .batch import Batch
from .trainer import LogprobTrainer, Tally


class SftTrainer(LogprobTrainer):
    """loss = - sum over supervised tokens of logp / number of supervised tokens in the window."""

    def normaliser(self, batch: Batch) -> int:
        """Supervised tokens."""
        return sum(batch["lengths"])

    def summed_loss(self, model: nn.Module, batch: Batch, tally: Tally) -> Tensor:
        """Negative log-likelihood of the batch, summed over tokens."""
        logp = self.logps(model, batch)
        tally.add_batch(batch, self.normaliser(batch))
        return -logp.sum()

    def _drain(self, tally: Tally) -> dict[str, float]:
        means = super()._drain(tally)
        if "loss" in means:  # an evaluation
            means["perplexity"] = math.exp(min(means["loss"], 700.0))
        return means
