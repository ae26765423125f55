"""The correctness gate: a variant whose first step is wrong, or that does not learn, gets no figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# bf16 keeps 8 bits of each logit; averaged over a thousand tokens, 3e-4 of the loss (about 22) was seen.
# Labels shifted by one token, or a prompt that counts as an answer, change it by more than 0.5.
LOSS_TOLERANCE = 5e-3
# Policy and reference are one and the same model at the first step, so their difference is 0 exactly.
DPO_LOSS_TOLERANCE = 1e-4
# bf16 again, on sums of 382 log-probs; 3e-5 was seen.
LOGP_TOLERANCE = 5e-4
# The adapter's random A differs from library to library, but 64 random directions measure one gradient
# alike: 6e-4 was seen. Dropout adds noise of its own, in SFT 3 % of the norm.
GRADIENT_TOLERANCE = 0.01
DROPOUT_GRADIENT_TOLERANCE = 0.05


def check(task: str, result: Mapping[str, Any], expected: Mapping[str, float]) -> str | None:
    """Why a result is not to be trusted, in one line, or None.

    `result` is what a worker wrote; `expected` the task's first step by `workers.expected`. The gradient
    of DPO is compared only without dropout: chosen and rejected answers see different masks, and their
    difference is what that gradient consists of.
    """
    logs = result["logs"]
    if not logs:
        return "nothing was logged"
    first, last = logs[0], logs[-1]
    tolerance = DPO_LOSS_TOLERANCE if task == "dpo" else LOSS_TOLERANCE
    if not abs(first["loss"] - expected["loss"]) <= tolerance:
        return f"first loss is {first['loss']:.5f}, expected {expected['loss']:.5f} within {tolerance}"
    name = "logps/chosen"
    if name in expected and not _close(first[name], expected[name], LOGP_TOLERANCE):
        return f"first {name} is {first[name]:.2f}, expected {expected[name]:.2f} within {LOGP_TOLERANCE:.2%}"
    dropout = result["settings"]["dropout"] > 0
    tolerance = DROPOUT_GRADIENT_TOLERANCE if dropout else GRADIENT_TOLERANCE
    found, wanted = first["grad_norm"], expected["grad_norm"]
    if not (task == "dpo" and dropout) and not _close(found, wanted, tolerance):
        return f"first grad_norm is {found:.3f}, expected {wanted:.3f} within {tolerance:.0%}"
    if len(logs) > 1 and not last["loss"] < first["loss"]:
        return f"does not learn: loss {first['loss']:.5f} at the first step, {last['loss']:.5f} at the last"
    return None


def _close(value: float, wanted: float, tolerance: float) -> bool:
    return abs(value - wanted) <= tolerance * abs(wanted)
