"""What a checkpoint's bytes predict, against the 16-bit model: read by this project, in float32.

Window by window, so that intervals over windows can be had.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from qtrain.evaluation.bootstrap import mean_interval
from qtrain.export.agreement import Agreement, agreement
from qtrain.export.streamed_model import StreamedModel
from qtrain.export.verify import Bounds, Verdict

POSITIONS = 128  # whose logits are there at once, in float64


@dataclass(frozen=True, slots=True)
class Quality:
    """KL(reference || checkpoint) and what goes with it; of every window one agreement."""

    windows: list[Agreement]
    lengths: list[int]

    @property
    def whole(self) -> Agreement:
        """Over all positions of all windows."""
        positions = sum(self.lengths)

        def mean(values: Sequence[float]) -> float:
            return sum(v * n for v, n in zip(values, self.lengths, strict=True)) / positions

        return Agreement(
            kl=mean([its.kl for its in self.windows]),
            kl_max=max(its.kl_max for its in self.windows),
            top1=mean([its.top1 for its in self.windows]),
            max_logit_difference=max(its.max_logit_difference for its in self.windows),
            perplexity_p=math.exp(self._nll([its.perplexity_p for its in self.windows])),
            perplexity_q=math.exp(self._nll([its.perplexity_q for its in self.windows])),
            positions=positions,
        )

    def _nll(self, perplexities: Sequence[float]) -> float:
        """Of a next token; a window has one less of them than tokens."""
        targets = sum(n - 1 for n in self.lengths)
        pairs = zip(perplexities, self.lengths, strict=True)
        return sum(math.log(value) * (n - 1) for value, n in pairs) / targets

    def kl_interval(self) -> tuple[float, float]:
        """95 %, over windows."""
        sums = [its.kl * n for its, n in zip(self.windows, self.lengths, strict=True)]
        found = mean_interval(sums, [float(n) for n in self.lengths])
        return found.low, found.high

    def failure(self, bounds: Bounds | None) -> str | None:
        """Why this is no working copy of the model, in one line, or None."""
        whole = self.whole
        if not (math.isfinite(whole.kl) and math.isfinite(whole.perplexity_q)):
            return f"KL is {whole.kl:g}, perplexity {whole.perplexity_q:g}"
        failures = Verdict(whole, None, bounds).failures
        return "; ".join(failures) or None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "whole": self.whole.as_dict(),
            "windows": [asdict(its) for its in self.windows],
            "lengths": self.lengths,
        }


class Judge:
    """The reference's hidden states on the windows, computed once."""

    def __init__(self, reference: StreamedModel, windows: Sequence[Sequence[int]]) -> None:
        self._reference, self._windows = reference, windows
        self._states: list[Tensor] = reference.hidden_states(windows)

    def score(self, model: StreamedModel) -> Quality:
        """Of one checkpoint.

        Raises:
            ExportError: its files are damaged.
        """
        states = model.hidden_states(self._windows)
        found = [
            agreement(
                [window],
                ([self._states[number]], self._reference.logits),
                ([states[number]], model.logits),
                rows=POSITIONS,
            )
            for number, window in enumerate(self._windows)
        ]
        return Quality(found, [len(window) for window in self._windows])
