"""Log-probabilities of labels straight from hidden states, without the logits.

    z = softcap * tanh(logit_scale * (h W^T + b) / softcap)
    logp[t] = z[t, y_t] - logsumexp_v z[t, v]

The [M, V] logits of a 152k vocabulary are the largest tensor of a training step. Here they exist
only as tiles of `ROW_TILE` x `VOCAB_TILE`; the softmax is carried along the vocabulary with a
running maximum, as flash attention carries it along the keys, with W as both keys and values.
`docs/kernels.md` has the derivation.
"""

from __future__ import annotations

from typing import NamedTuple

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
    logp, lse, entropy = _LinearLogprob.apply(h, lm_head_weight, bias, y, softcap, logit_scale, return_stats)
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
            f"label {int(labels[bad][0])} is outside [0, {weight.shape[0]}) and not ignore_index={ignore_index}"
        )


class _LinearLogprob(torch.autograd.Function):
    """Labelled rows only; dispatches on what needs a gradient."""

    @staticmethod
    def forward(ctx, h, weight, bias, labels, softcap, scale, stats):  # type: ignore[no-untyped-def]
        trainable_head = weight.requires_grad or (bias is not None and bias.requires_grad)
        want_u = h.requires_grad and not trainable_head
        logp, lse, entropy, u = _forward_tiles(h, weight, bias, labels, softcap, scale, want_u, stats)
        ctx.trainable_head, ctx.softcap, ctx.scale = trainable_head, softcap, scale
        if trainable_head:
            ctx.save_for_backward(h, weight, bias, labels, lse)
        else:
            ctx.save_for_backward(u)
        ctx.mark_non_differentiable(lse, entropy)
        return logp, lse, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _grad_lse, _grad_entropy):  # type: ignore[no-untyped-def]
        if ctx.trainable_head:
            dh, dw, db = _backward_tiles(
                grad, *ctx.saved_tensors, ctx.softcap, ctx.scale, ctx.needs_input_grad
            )
            return dh, dw, db, None, None, None, None
        (u,) = ctx.saved_tensors
        dh = None if u is None else (u * grad.unsqueeze(1)).to(u.dtype)
        return dh, None, None, None, None, None, None


def _acc_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _cap(z: Tensor, bias: Tensor | None, softcap: float | None, scale: float) -> Tensor:
    """Bias, scale and soft-cap in place on a tile of logits in accumulation dtype."""
    if bias is not None:
        z += bias
    if scale != 1.0:
        z *= scale
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    return z


def _slope(z: Tensor, softcap: float | None) -> Tensor | None:
    """dz/d(scaled logit) = 1 - (z / softcap)^2, or None where it is 1."""
    return None if softcap is None else 1 - (z / softcap).square_()


def _label_logits(h: Tensor, w_label: Tensor, bias: Tensor | None, labels: Tensor, softcap, scale) -> Tensor:  # type: ignore[no-untyped-def]
    acc = _acc_dtype(w_label)
    z = torch.linalg.vecdot(h.to(acc), w_label.to(acc))  # [T]
    return _cap(z, None if bias is None else bias.index_select(0, labels).to(acc), softcap, scale)


def _finite(m: Tensor) -> Tensor:
    """A maximum of -inf (every logit so far is -inf) would make exp(z - m) NaN; 0 serves as well."""
    return torch.where(m == -torch.inf, torch.zeros_like(m), m)


def _forward_tiles(h, weight, bias, labels, softcap, scale, want_u, stats):  # type: ignore[no-untyped-def]
    """Row tile by row tile; returns logp, lse, entropy [T] and u [T, H] in the dtype of h, or None."""
    acc = _acc_dtype(weight)
    logp, lse, entropy = (torch.empty(labels.shape, dtype=acc, device=h.device) for _ in range(3))
    u = torch.empty_like(h) if want_u else None
    for start in range(0, labels.numel(), ROW_TILE):
        part = slice(start, start + ROW_TILE)
        tile = _softmax_along_vocab(
            h[part].to(weight.dtype), weight, bias, labels[part], softcap, scale, want_u, stats
        )
        logp[part], lse[part], entropy[part], u_part = tile
        if u is not None:
            u[part] = u_part
    if not stats:
        entropy.zero_()
    return logp, lse, entropy, u


def _softmax_along_vocab(h, weight, bias, labels, softcap, scale, want_u, stats):  # type: ignore[no-untyped-def]
    """One row tile: running maximum m, sum s, and the weighted sums of W (for u) and of z (for the entropy).

    The state starts from the label itself (m = z_y, s = 1), whose logit is then left out of its tile:
    so p_y comes from the exact float32 logit even where the tiles are rounded to bf16.
    """
    acc = _acc_dtype(weight)
    w_label = weight.index_select(0, labels)  # [T, H]
    z_label = _label_logits(h, w_label, bias, labels, softcap, scale)
    slope_label = _slope(z_label, softcap)
    grad_label = w_label.to(acc) if slope_label is None else w_label.to(acc) * slope_label.unsqueeze(1)
    m = z_label.clone()
    s = torch.exp(z_label - _finite(m))
    weighted = grad_label * s.unsqueeze(1) if want_u else None  # [T, H]
    z_sum = torch.special.xlogy(s, 1.0) + torch.where(s > 0, s * z_label, s) if stats else None
    for first in range(0, weight.shape[0], VOCAB_TILE):
        w = weight[first : first + VOCAB_TILE]
        z = (h @ w.T).to(acc)  # [T, v]
        _cap(z, None if bias is None else bias[first : first + VOCAB_TILE].to(acc), softcap, scale)
        inside = ((labels >= first) & (labels < first + w.shape[0])).nonzero().squeeze(1)
        z[inside, labels[inside] - first] = -torch.inf
        m_new = torch.maximum(m, z.amax(dim=1))
        rescale = torch.exp(m - _finite(m_new))  # [T]
        slope = _slope(z, softcap)
        z_kept = z.clone() if stats else None
        p = z.sub_(_finite(m_new).unsqueeze(1)).exp_()
        s = s * rescale + p.sum(dim=1)
        if z_sum is not None and z_kept is not None:
            z_sum = z_sum * rescale + torch.where(p > 0, p * z_kept, p).sum(dim=1)
        if weighted is not None:
            weighted.mul_(rescale.unsqueeze(1))
            weighted += (p if slope is None else p * slope.nan_to_num_()).to(w.dtype) @ w
        m = m_new
    lse = m + torch.log(s)
    u = None if weighted is None else (grad_label - weighted / s.unsqueeze(1)) * scale
    entropy = lse - z_sum / s if z_sum is not None else lse
    return z_label - lse, lse, entropy, u


def _backward_tiles(grad, h, weight, bias, labels, lse, softcap, scale, needs):  # type: ignore[no-untyped-def]
    """dz = g * (onehot - p) * slope * scale, tile by tile: dh += dz W, dW += dz^T h, db += sum dz."""
    acc = _acc_dtype(weight)
    hw = h.to(weight.dtype)
    dh = torch.zeros(h.shape, dtype=acc, device=h.device) if needs[0] else None
    dw = torch.zeros_like(weight) if needs[1] else None
    db = torch.zeros_like(bias) if bias is not None and needs[2] else None
    for first in range(0, weight.shape[0], VOCAB_TILE):
        w = weight[first : first + VOCAB_TILE]
        span = slice(first, first + w.shape[0])
        dw_tile = torch.zeros(w.shape, dtype=acc, device=w.device) if dw is not None else None
        db_tile = torch.zeros(w.shape[:1], dtype=acc, device=w.device) if db is not None else None
        for start in range(0, labels.numel(), ROW_TILE):
            part = slice(start, start + ROW_TILE)
            z = _cap((hw[part] @ w.T).to(acc), None if bias is None else bias[span].to(acc), softcap, scale)
            slope = _slope(z, softcap)
            dz = z.sub_(_finite(lse[part]).unsqueeze(1)).exp_().neg_()
            y = labels[part]
            inside = ((y >= first) & (y < first + w.shape[0])).nonzero().squeeze(1)
            dz[inside, y[inside] - first] += 1
            dz *= grad[part].unsqueeze(1) * scale
            if slope is not None:
                dz *= slope.nan_to_num_()
            dz_low = dz.to(w.dtype)
            if dh is not None:
                dh[part] += dz_low @ w
            if dw_tile is not None:
                dw_tile += dz_low.T @ hw[part]
            if db_tile is not None:
                db_tile += dz.sum(dim=0)
        if dw is not None:
            dw[span] = dw_tile.to(dw.dtype)
        if db is not None:
            db[span] = db_tile.to(db.dtype)
    return None if dh is None else dh.to(h.dtype), dw, db
