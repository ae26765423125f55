"""Preference losses, a few lines each, over the summed log-probs of the answers.

With h = (chosen - reference of chosen) - (rejected - reference of rejected):

    sigmoid  -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)     e: label smoothing
    hinge    max(0, 1 - beta h)
    ipo      (h' - 1 / (2 beta))^2                                     h' over mean log-probs

Sources: DPO, Rafailov et al. 2023, eq. 7; label smoothing, Mitchell 2023 (conservative DPO); hinge,
Zhao et al. 2023 (SLiC-HF); IPO, Azar et al. 2023, eq. 17, with mean log-probs as its authors advise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qtrain.recipe.schema import DpoSettings


@dataclass(frozen=True, slots=True)
class Preferences:
    """What a batch of P pairs came out as; every field [P]."""

    chosen: Tensor  # policy log-prob of the chosen answer, summed over its tokens
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor


def preference_loss(pairs: Preferences, settings: DpoSettings) -> Tensor:
    """Loss of each pair, [P]; ln 2 (sigmoid), 1 (hinge), 1 / (4 beta^2) (ipo) where policy == reference."""
    chosen = pairs.chosen - pairs.reference_chosen
    rejected = pairs.rejected - pairs.reference_rejected
    beta = settings.beta
    if settings.loss == "ipo":
        h = chosen / pairs.chosen_tokens - rejected / pairs.rejected_tokens
        return (h - 1 / (2 * beta)).square()
    h = beta * (chosen - rejected)
    if settings.loss == "hinge":
        return torch.relu(1 - h)
    smoothing = settings.label_smoothing
    return -(1 - smoothing) * F.logsigmoid(h) - smoothing * F.logsigmoid(-h)


def reward_metrics(pairs: Preferences, beta: float) -> dict[str, Tensor]:
    """Implicit rewards beta (logp - reference logp) and what is usually read off them; each [P]."""
    chosen = beta * (pairs.chosen - pairs.reference_chosen).detach()
    rejected = beta * (pairs.rejected - pairs.reference_rejected).detach()
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "logps/chosen": pairs.chosen.detach(),
        "logps/rejected": pairs.rejected.detach(),
    }
