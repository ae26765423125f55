"""How far two models' predictions are from each other on token windows.

KL(P || Q) = mean over positions of sum_v P(v) (log P(v) - log Q(v))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

ROWS = 32  # positions whose logits are there at once: 40 MB in float64 for a vocabulary of 152k


@dataclass(frozen=True, slots=True)
class Agreement:
    """P against Q over `positions` positions.

    Attributes:
        kl: mean KL(P || Q), nats.
        kl_max: of the worst position.
        top1: share of positions at which both have the same likeliest token.
        max_logit_difference: largest |difference| of a logit.
        perplexity_p, perplexity_q: of the windows' own next tokens.
        positions: that were compared.
    """

    kl: float
    kl_max: float
    top1: float
    max_logit_difference: float
    perplexity_p: float
    perplexity_q: float
    positions: int

    def as_dict(self) -> dict[str, float | int]:
        """For JSON."""
        return asdict(self)


Logits = Callable[[Tensor], Tensor]


def agreement(
    windows: Sequence[Sequence[int]],
    p: tuple[Sequence[Tensor], Logits],
    q: tuple[Sequence[Tensor], Logits],
    *,
    rows: int = ROWS,
) -> Agreement:
    """Compare two models by their hidden states ([T, H] for each window) and output heads.

    Every position is compared; the perplexities are over those that have a next token in the window.
    """
    kl_sum = kl_max = difference = nll_p = nll_q = 0.0
    same = positions = targets = 0
    for number, window in enumerate(windows):
        following = torch.tensor([*window[1:], -1])
        for first in range(0, len(window), rows):
            logits_p = p[1](p[0][number][first : first + rows]).to(torch.float64)  # [M, V]
            logits_q = q[1](q[0][number][first : first + rows]).to(torch.float64)
            difference = max(difference, float((logits_p - logits_q).abs().max()))
            same += int((logits_p.argmax(-1) == logits_q.argmax(-1)).sum())
            log_p, log_q = logits_p.log_softmax(-1), logits_q.log_softmax(-1)
            kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp_(min=0.0)  # below 0 only by rounding
            kl_sum, kl_max = kl_sum + float(kl.sum()), max(kl_max, float(kl.max()))
            positions += kl.numel()
            label = following[first : first + rows].to(kl.device)
            known = label >= 0
            targets += int(known.sum())
            place = (known.nonzero().squeeze(1), label[known])
            nll_p -= float(log_p[place].sum())
            nll_q -= float(log_q[place].sum())
    return Agreement(
        kl_sum / positions,
        kl_max,
        same / positions,
        difference,
        _exp(nll_p / max(targets, 1)),
        _exp(nll_q / max(targets, 1)),
        positions,
    )


def _exp(mean: float) -> float:
    """A perplexity beyond float64 is infinite."""
    return math.exp(mean) if mean < 709 else math.inf
