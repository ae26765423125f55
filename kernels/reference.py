"""The normative definition of every op, in plain PyTorch: what the fast paths are compared with.

Each runs in the dtype of its inputs, so that float64 inputs give the float64 reference.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear_logprob(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """z = cap(scale * (h W^T + b)); returns z[t, y_t] - lse(z[t]), lse(z[t]) and the entropy, each [M].

    Materialises z [M, V]. Rows whose label is `ignore_index` are 0 in all three.
    """
    logits = hidden_states @ lm_head_weight.T  # [M, V]
    if bias is not None:
        logits = logits + bias
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    labelled = labels != ignore_index
    logp = logits.log_softmax(dim=-1)
    chosen = logp.gather(1, labels.clamp_min(0).unsqueeze(1)).squeeze(1)
    entropy = -torch.special.xlogy(logp.exp(), logp.exp()).sum(dim=-1)
    lse = logits.logsumexp(dim=-1)
    zero = logits.new_zeros(())
    return (
        torch.where(labelled, chosen, zero),
        torch.where(labelled, lse, zero),
        torch.where(labelled, entropy, zero),
    )


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    keep: Tensor | None = None,
) -> Tensor:
    """y = x W^T + bias + scaling * (x * keep / (1 - dropout_p)) A^T B^T, [..., N]; `keep` is 0 or 1, as x."""
    dropped = x if keep is None else x * keep / (1 - dropout_p)
    y = x @ weight.T + scaling * (dropped @ lora_A.T @ lora_B.T)
    return y if bias is None else y + bias


def nf4_dequantize(
    packed: Tensor, absmax: Tensor, code: Tensor, blocksize: int, shape: tuple[int, int]
) -> Tensor:
    """W.flatten()[i] = code[nibble i] * absmax[i // blocksize]; of a byte the high nibble comes first."""
    nibbles = torch.stack((packed.flatten() >> 4, packed.flatten() & 15), dim=1).flatten().to(torch.int64)
    return (code[nibbles] * absmax.repeat_interleave(blocksize)[: nibbles.numel()]).view(shape)
