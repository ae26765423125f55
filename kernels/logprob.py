"""Log-probabilities of labels straight from hidden states, without the logits.

    z = softcap * tanh(logit_scale * (h W^T + b) / softcap)
    logp[t] = z[t, y_t] - logsumexp_v z[t, v]

The [M, V] logits of a 152k vocabulary are the largest tensor of a training step. Here they exist
only as tiles of `ROW_TILE` x `VOCAB_TILE`; the softmax is carried along the vocabulary with a
running maximum, as flash attention carries it along the keys, with W as both keys and values.
`docs/kernels.md` has the derivation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# 512 x 4096 float32 logits are 8 MiB: they stay in a desktop CPU's last-level cache between the two
# GEMMs, and both GEMMs are large enough to run at full speed (docs/lab-log.md has the sweep).
ROW_TILE = 512
VOCAB_TILE = 4096


class LogprobOutput(NamedTuple):
    """Per-token results, each [M] in float32 (float64 for float64 inputs)."""

    logp: Tensor
    lse: Tensor  # not differentiable
    entropy: Tensor  # not differentiable


def linear_logprob(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    return_stats: bool = False,
) -> Tensor | LogprobOutput:
    """logp[t] = z[t, y_t] - logsumexp_v z[t, v] with z = cap(logit_scale * (h W^T + b)).

    The matmuls run in the dtype of `lm_head_weight` (hidden states are cast to it), everything else
    in float32, or float64 for float64 weights. Autocast does not change that. Rows labelled
    `ignore_index` are not computed: their logp is 0 and so is their gradient. The label's own logit
    is a float32 dot product, never rounded to the weight's dtype.

    Where only the hidden states need a gradient, the forward also leaves
    u = dlogp/dh = W[y] - sum_v p_v W_v  [M, H] and the backward is one product g * u. Where the
    weight or bias needs one, the backward computes the tiles again. Same bits on every run.

    Memory beyond inputs and outputs: tiles of `ROW_TILE` x `VOCAB_TILE` logits, and u.

    Args:
        hidden_states: [M, H], floating point.
        lm_head_weight: [V, H]; may be tied to the embedding.
        labels: [M] int64 in [0, V) or `ignore_index`.
        bias: [V] or None.
        softcap: > 0 or None (Gemma 2's final logit soft-capping).
        logit_scale: factor on the logits before the cap.
        return_stats: return `LogprobOutput` with the log-sum-exp and the entropy as well.

    Raises:
        ValueError: shapes that do not fit, softcap <= 0, or a label outside [0, V).
        TypeError: labels that are not int64.
    """
    _check(hidden_states, lm_head_weight, labels, bias, softcap, ignore_index)
    rows = (labels != ignore_index).nonzero().squeeze(1)  # [T]
    everything = rows.numel() == labels.numel()
    h = hidden_states if everything else hidden_states.index_select(0, rows)
    y = labels if everything else labels.index_select(0, rows)
    logits = _Logits(lm_head_weight, bias, softcap, logit_scale)
    parts = _LinearLogprob.apply(h, lm_head_weight, bias, y, logits, return_stats)  # type: ignore[no-untyped-call]
    logp, lse, entropy = parts
    if not everything:
        logp, lse, entropy = (
            part.new_zeros(labels.shape).index_put((rows,), part) for part in (logp, lse, entropy)
        )
    return LogprobOutput(logp, lse, entropy) if return_stats else logp


def _check(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    ignore_index: int,
) -> None:
    if hidden_states.dim() != 2 or weight.dim() != 2 or hidden_states.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden_states {tuple(hidden_states.shape)} and lm_head_weight {tuple(weight.shape)} "
            "must be [M, H] and [V, H]"
        )
    if labels.shape != hidden_states.shape[:1]:
        raise ValueError(f"labels {tuple(labels.shape)} must be [{hidden_states.shape[0]}]")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels are {labels.dtype}, must be torch.int64")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} must be [{weight.shape[0]}]")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}, must be > 0 or None")
    bad = ((labels < 0) | (labels >= weight.shape[0])) & (labels != ignore_index)
    if bool(bad.any()):
        raise ValueError(
            f"label {int(labels[bad][0])} is outside [0, {weight.shape[0]}) "
            f"and not ignore_index={ignore_index}"
        )


@dataclass(frozen=True, slots=True)
class _Logits:
    """z = cap(scale * (h W^T + b)): how a tile of logits is made, and its slope."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float

    @property
    def dtype(self) -> torch.dtype:
        """Of everything but the matmuls."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    def tile(self, h: Tensor, words: slice) -> Tensor:
        """Logits of some words, [T, v]."""
        bias = None if self.bias is None else self.bias[words]
        return self._finish((h @ self.weight[words].T).to(self.dtype), bias)

    def of_labels(self, h: Tensor, w_label: Tensor, labels: Tensor) -> Tensor:
        """Each row's own label's logit, [T], not rounded to the dtype of the weight."""
        bias = None if self.bias is None else self.bias.index_select(0, labels)
        return self._finish(torch.linalg.vecdot(h.to(self.dtype), w_label.to(self.dtype)), bias)

    def _finish(self, z: Tensor, bias: Tensor | None) -> Tensor:
        if bias is not None:
            z += bias.to(self.dtype)
        if self.scale != 1.0:
            z *= self.scale
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z

    def slope(self, z: Tensor) -> Tensor | None:
        """dz / d(scaled logit) = 1 - (z / softcap)^2; None where it is 1."""
        if self.softcap is None:
            return None
        return (1 - (z / self.softcap).square_()).nan_to_num_()  # a forbidden word's -inf has no slope

    def vocabulary(self) -> list[slice]:
        """Its tiles."""
        size = self.weight.shape[0]
        return [slice(first, min(first + VOCAB_TILE, size)) for first in range(0, size, VOCAB_TILE)]


def _row_tiles(count: int) -> list[slice]:
    return [slice(start, start + ROW_TILE) for start in range(0, count, ROW_TILE)]


def _labels_inside(labels: Tensor, words: slice) -> tuple[Tensor, Tensor]:
    """Rows whose label lies among `words`, and its place there."""
    rows = ((labels >= words.start) & (labels < words.stop)).nonzero().squeeze(1)
    return rows, labels[rows] - words.start


def _finite(m: Tensor) -> Tensor:
    """A maximum of -inf (every logit so far is -inf) would make exp(z - m) NaN; 0 serves as well."""
    return torch.where(m == -torch.inf, torch.zeros_like(m), m)


class _LinearLogprob(torch.autograd.Function):
    """Labelled rows only; what is saved depends on what needs a gradient."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, logits: _Logits, stats: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.trainable_head = weight.requires_grad or (bias is not None and bias.requires_grad)
        want_u = h.requires_grad and not ctx.trainable_head
        logp, lse, entropy, u = _forward(h, labels, logits, want_u, stats)
        ctx.logits = logits
        ctx.save_for_backward(*((h, labels, lse) if ctx.trainable_head else (u,)))
        ctx.mark_non_differentiable(lse, entropy)
        return logp, lse, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor, _grad_lse: Tensor, _grad_entropy: Tensor
    ) -> tuple[Tensor | None, ...]:
        if ctx.trainable_head:
            h, labels, lse = ctx.saved_tensors
            dh, dw, db = _backward(grad, h, labels, lse, ctx.logits, ctx.needs_input_grad)
            return dh, dw, db, None, None, None
        (u,) = ctx.saved_tensors
        dh = None if u is None else (u * grad.unsqueeze(1)).to(u.dtype)
        return dh, None, None, None, None, None


def _forward(
    h: Tensor, labels: Tensor, logits: _Logits, want_u: bool, stats: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Row tile by row tile; logp, lse, entropy [T], and u [T, H] in the dtype of h."""
    logp, lse, entropy = (torch.zeros(labels.shape, dtype=logits.dtype, device=h.device) for _ in range(3))
    u = torch.empty_like(h) if want_u else None
    for rows in _row_tiles(labels.numel()):
        softmax = _Softmax(h[rows].to(logits.weight.dtype), labels[rows], logits, want_u, stats)
        for words in logits.vocabulary():
            softmax.add(words)
        lse[rows] = softmax.m + torch.log(softmax.s)
        logp[rows] = softmax.z_label - lse[rows]
        if softmax.z_sum is not None:
            entropy[rows] = lse[rows] - softmax.z_sum / softmax.s
        if u is not None:
            u[rows] = softmax.u()
    return logp, lse, entropy, u


class _Softmax:
    """The softmax of one row tile, carried along the vocabulary.

    m is the running maximum, s the sum of exp(z - m), `weighted` the same sum with W (for u) and `z_sum`
    with z (for the entropy). The state starts from the label itself (m = z_y, s = 1), which is then left
    out of its tile: p_y comes from the exact logit even where the tiles are rounded to bf16.
    """

    def __init__(self, h: Tensor, labels: Tensor, logits: _Logits, want_u: bool, stats: bool) -> None:
        self.h, self.labels, self.logits = h, labels, logits
        w_label = logits.weight.index_select(0, labels)  # [T, H]
        self.z_label = logits.of_labels(h, w_label, labels)
        self.m = self.z_label.clone()
        self.s = torch.exp(self.z_label - _finite(self.m))  # 1, or 0 for a forbidden label
        slope = logits.slope(self.z_label)
        w_label = w_label.to(logits.dtype)
        self.grad_label = w_label if slope is None else w_label * slope.unsqueeze(1)
        self.weighted = self.grad_label * self.s.unsqueeze(1) if want_u else None  # [T, H]
        self.z_sum = torch.where(self.s > 0, self.s * self.z_label, self.s) if stats else None

    def add(self, words: slice) -> None:
        """Take one tile of the vocabulary in."""
        z = self.logits.tile(self.h, words)  # [T, v]
        z[_labels_inside(self.labels, words)] = -torch.inf
        m = torch.maximum(self.m, z.amax(dim=1))
        rescale = torch.exp(self.m - _finite(m))  # [T]
        slope = self.logits.slope(z)
        kept = z.clone() if self.z_sum is not None else None
        p = z.sub_(_finite(m).unsqueeze(1)).exp_()
        self.m, self.s = m, self.s * rescale + p.sum(dim=1)
        if self.z_sum is not None and kept is not None:
            self.z_sum = self.z_sum * rescale + torch.where(p > 0, p * kept, p).sum(dim=1)
        if self.weighted is not None:
            w = self.logits.weight[words]
            self.weighted.mul_(rescale.unsqueeze(1))
            self.weighted += (p if slope is None else p * slope).to(w.dtype) @ w

    def u(self) -> Tensor:
        """dlogp/dh = scale * (slope_y W_y - sum_v p_v slope_v W_v)."""
        if self.weighted is None:
            raise RuntimeError("u was not asked for")
        return (self.grad_label - self.weighted / self.s.unsqueeze(1)) * self.logits.scale


def _backward(
    grad: Tensor, h: Tensor, labels: Tensor, lse: Tensor, logits: _Logits, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dz = g * (onehot - p) * slope * scale, tile by tile: dh += dz W, dW = dz^T h, db = sum dz."""
    weight, bias = logits.weight, logits.bias
    low = h.to(weight.dtype)
    dh = torch.zeros(h.shape, dtype=logits.dtype, device=h.device)
    dw = torch.zeros_like(weight) if needs[1] else None
    db = torch.zeros_like(bias) if bias is not None and needs[2] else None
    for words in logits.vocabulary():
        w = weight[words]
        dw_tile = torch.zeros(w.shape, dtype=logits.dtype, device=w.device)
        db_tile = torch.zeros(w.shape[:1], dtype=logits.dtype, device=w.device)
        for rows in _row_tiles(labels.numel()):
            dz = _logit_gradient(grad[rows], low[rows], labels[rows], lse[rows], logits, words)
            if needs[0]:
                dh[rows] += dz.to(w.dtype) @ w
            if dw is not None:
                dw_tile += dz.to(w.dtype).T @ low[rows]
            db_tile += dz.sum(dim=0)
        if dw is not None:
            dw[words] = dw_tile.to(dw.dtype)
        if db is not None:
            db[words] = db_tile.to(db.dtype)
    return dh.to(h.dtype) if needs[0] else None, dw, db


def _logit_gradient(
    grad: Tensor, h: Tensor, labels: Tensor, lse: Tensor, logits: _Logits, words: slice
) -> Tensor:
    """g * (onehot - p) * slope * scale for one tile, [T, v]."""
    z = logits.tile(h, words)
    slope = logits.slope(z)
    dz = z.sub_(_finite(lse).unsqueeze(1)).exp_().neg_()
    dz[_labels_inside(labels, words)] += 1
    dz *= grad.unsqueeze(1) * logits.scale
    return dz if slope is None else dz.mul_(slope)
