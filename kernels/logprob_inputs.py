"""The arguments of `linear_logprob`, checked, and the rows of them that have a label."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LogprobInputs:
    """What both backends start from. z = cap(scale * (h W^T + b))."""

    hidden_states: Tensor  # [M, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [T], of the labelled rows alone
    rows: Tensor  # [T] int64, their places among the M
    bias: Tensor | None  # [V]
    softcap: float | None
    scale: float

    @property
    def complete(self) -> bool:
        """Whether every row has a label."""
        return self.rows.numel() == self.hidden_states.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of everything but the matmuls."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    def hidden_tile(self, tile: slice) -> Tensor:
        """Hidden states of some labelled rows in the dtype of the weight, [t, H]."""
        if self.complete:
            return self.hidden_states[tile].to(self.weight.dtype)
        return self.hidden_states.index_select(0, self.rows[tile]).to(self.weight.dtype)

    def per_row(self) -> Tensor:
        """Zeros for one result a row, [M]."""
        return torch.zeros(self.hidden_states.shape[0], dtype=self.dtype, device=self.hidden_states.device)

    def gradient(self) -> Tensor:
        """Place for u, like the hidden states: rows without a label are 0, the others yet to be written."""
        if self.complete:
            return torch.empty_like(self.hidden_states, memory_format=torch.contiguous_format)
        return torch.zeros_like(self.hidden_states, memory_format=torch.contiguous_format)


def check_shapes(
    hidden_states: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, softcap: float | None
) -> None:
    """What can be told without looking at the data.

    Raises:
        ValueError: shapes or devices that do not fit, softcap <= 0.
        TypeError: labels that are not int64, tensors that are not floating point.
    """
    if hidden_states.dim() != 2 or weight.dim() != 2 or hidden_states.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden_states {tuple(hidden_states.shape)} and lm_head_weight {tuple(weight.shape)} "
            "must be [M, H] and [V, H]"
        )
    if not hidden_states.is_floating_point() or not weight.is_floating_point():
        raise TypeError(
            f"hidden_states are {hidden_states.dtype} and lm_head_weight is {weight.dtype}, "
            "must be floating point"
        )
    if labels.shape != hidden_states.shape[:1]:
        raise ValueError(f"labels {tuple(labels.shape)} must be [{hidden_states.shape[0]}]")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels are {labels.dtype}, must be torch.int64")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} must be [{weight.shape[0]}]")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}, must be > 0 or None")
    others = [weight, labels] if bias is None else [weight, labels, bias]
    if any(other.device != hidden_states.device for other in others):
        devices = ", ".join(str(tensor.device) for tensor in (hidden_states, *others))
        raise ValueError(
            f"hidden_states, lm_head_weight, labels and bias are on {devices}, must be on one device"
        )


def labelled(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    ignore_index: int,
) -> LogprobInputs:
    """Leave the rows without a label out. On CUDA this waits for the labels.

    Raises:
        ValueError: a label outside [0, V) that is not `ignore_index`.
    """
    vocab = weight.shape[0]
    rows = (labels != ignore_index).nonzero().squeeze(1)
    chosen = labels if rows.numel() == labels.numel() else labels.index_select(0, rows)
    bad = (chosen < 0) | (chosen >= vocab)
    if bool(bad.any()):
        raise ValueError(
            f"label {int(chosen[bad][0])} is outside [0, {vocab}) and not ignore_index={ignore_index}"
        )
    return LogprobInputs(hidden_states, weight, chosen, rows, bias, softcap, scale)
