"""Direct preference optimisation against the policy that the run starts from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qtrain.recipe.schema import DpoSettings

from .batch import Batch, sequence_sums
from .losses import Preferences, preference_loss, reward_metrics
from .trainer import LogprobTrainer, Tally


class DpoTrainer(LogprobTrainer):
    """loss = mean over pairs of the preference loss + sft_weight * mean NLL of the chosen answer's tokens.

    The reference's log-probs are looked up by row number; no second model and no second forward.
    """

    def __init__(
        self, *, dpo: DpoSettings, reference: Tensor, eval_reference: Tensor | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.dpo = dpo
        self.reference = reference  # [rows, 2]: chosen, rejected
        self.eval_reference = eval_reference

    def normaliser(self, batch: Batch) -> int:
        """Pairs."""
        return len(batch["rows"])

    def summed_loss(self, model: nn.Module, batch: Batch, tally: Tally) -> Tensor:
        """Preference loss of the batch, summed over pairs."""
        pairs = self._compare(self.logps(model, batch), batch, training=model.training)
        loss = preference_loss(pairs, self.dpo)
        if self.dpo.sft_weight:
            nll = -pairs.chosen / pairs.chosen_tokens
            tally.sums["sft_loss"] += nll.detach().sum().double().cpu()
            loss = loss + self.dpo.sft_weight * nll
        for name, values in reward_metrics(pairs, self.dpo.beta).items():
            tally.sums[name] += values.sum().double().cpu()
        tally.add_batch(batch, self.normaliser(batch))
        return loss.sum()

    def _compare(self, logp: Tensor, batch: Batch, *, training: bool) -> Preferences:
        sums = sequence_sums(logp, batch["lengths"])  # [2 P]
        lengths = torch.tensor(batch["lengths"], device=sums.device)
        reference = self.reference if training or self.eval_reference is None else self.eval_reference
        known = reference[batch["rows"]].to(sums.device)  # [P, 2]
        return Preferences(
            chosen=sums[0::2],
            rejected=sums[1::2],
            chosen_tokens=lengths[0::2],
            rejected_tokens=lengths[1::2],
            reference_chosen=known[:, 0],
            reference_rejected=known[:, 1],
        )
