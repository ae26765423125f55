"""linear_logprob in plain PyTorch, for the CPU and for whatever the Triton kernels do not take.

Logits exist only as tiles of `ROW_TILE` x `VOCAB_TILE`; the softmax is carried along the vocabulary
with a running maximum, as flash attention carries it along the keys, with W as both keys and values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cpu_matmul import product_with
from .logprob_inputs import LogprobInputs

# 1024 x 2048 float32 logits are 8 MiB: they stay in a desktop CPU's last-level cache between the two
# GEMMs, and both GEMMs are large enough to run at full speed (docs/lab-log.md has the sweep).
ROW_TILE = 1024
VOCAB_TILE = 2048


def forward(
    inputs: LogprobInputs, want_u: bool, want_entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """logp, lse, entropy [M] and u [M, H] in the dtype of the hidden states, row tile by row tile."""
    logp, lse = inputs.per_row(), inputs.per_row()
    entropy = inputs.per_row() if want_entropy else None
    u = inputs.gradient() if want_u else None
    memory = _TileMemory(inputs)
    for tile in _row_tiles(inputs):
        softmax = _Softmax(inputs, tile, memory, want_u, want_entropy)
        for words in _vocabulary(inputs):
            softmax.add(words)
        place = tile if inputs.complete else inputs.rows[tile]
        tile_lse = softmax.m + torch.log(softmax.s)
        lse[place] = tile_lse
        logp[place] = softmax.z_label - tile_lse
        if entropy is not None and softmax.z_sum is not None:
            entropy[place] = tile_lse - softmax.z_sum / softmax.s
        if u is not None:
            u[place] = softmax.u().to(u.dtype)
    return logp, lse, entropy, u


def head_gradient(
    inputs: LogprobInputs, grad: Tensor, _logp: Tensor, lse: Tensor, want_weight: bool, want_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dz = g * (onehot - p) * slope * scale, tile by tile: dW = dz^T h, db = sum dz. grad and lse: [M]."""
    weight, bias = inputs.weight, inputs.bias
    dw = torch.zeros_like(weight, memory_format=torch.contiguous_format) if want_weight else None
    db = torch.zeros_like(bias) if bias is not None and want_bias else None
    tiles = [(tile, inputs.rows[tile]) for tile in _row_tiles(inputs)]
    low = inputs.hidden_tile(slice(None))  # [T, H]
    memory = _TileMemory(inputs)
    for words in _vocabulary(inputs):
        dw_tile = low.new_zeros(weight[words].shape, dtype=inputs.dtype) if dw is not None else None
        db_tile = low.new_zeros(weight[words].shape[:1], dtype=inputs.dtype)
        for tile, rows in tiles:
            z = _logits(inputs, memory, low[tile], words)
            dz = _logit_gradient(inputs, z, grad[rows], inputs.labels[tile], lse[rows], words)
            if dw_tile is not None:
                dw_tile += memory.low(dz).T @ low[tile]
            db_tile += dz.sum(dim=0)
        if dw is not None and dw_tile is not None:
            dw[words] = dw_tile.to(dw.dtype)
        if db is not None:
            db[words] = db_tile.to(db.dtype)
    return dw, db


def _row_tiles(inputs: LogprobInputs) -> list[slice]:
    count = inputs.rows.numel()
    return [slice(start, min(start + ROW_TILE, count)) for start in range(0, count, ROW_TILE)]


def _vocabulary(inputs: LogprobInputs) -> list[slice]:
    size = inputs.weight.shape[0]
    return [slice(first, min(first + VOCAB_TILE, size)) for first in range(0, size, VOCAB_TILE)]


class _TileMemory:
    """Memory for one tile of logits, used again for every tile: fresh memory costs a page fault for 4 KiB."""

    def __init__(self, inputs: LogprobInputs) -> None:
        weight = inputs.weight
        size = min(ROW_TILE, inputs.rows.numel()) * min(VOCAB_TILE, weight.shape[0])
        self._low = weight.new_empty(size)
        if weight.dtype == torch.float32:
            size = 0  # oneDNN brings its own
        same = weight.dtype == inputs.dtype
        self._high = self._low if same else weight.new_empty(size, dtype=inputs.dtype)

    def product(self, h: Tensor, w: Tensor) -> Tensor:
        """h W^T [t, v] in the dtype of logits; overwrites the last one."""
        if h.dtype == torch.float32:
            return product_with(h, w)
        shape = (h.shape[0], w.shape[0])
        low = self._low[: shape[0] * shape[1]].view(shape)
        torch.mm(h, w.T, out=low)
        if self._high is self._low:
            return low
        return self._high[: shape[0] * shape[1]].view(shape).copy_(low)

    def low(self, tile: Tensor) -> Tensor:
        """A tile that came from `product`, in the dtype of the weight."""
        if self._high is self._low:
            return tile
        return self._low[: tile.numel()].view(tile.shape).copy_(tile)


def _logits(inputs: LogprobInputs, memory: _TileMemory, h: Tensor, words: slice) -> Tensor:
    """Logits of some words, [t, v]."""
    bias = None if inputs.bias is None else inputs.bias[words]
    return _finish_logits(inputs, memory.product(h, inputs.weight[words]), bias)


def _finish_logits(inputs: LogprobInputs, z: Tensor, bias: Tensor | None) -> Tensor:
    """Bias, scale and cap, in place."""
    if bias is not None:
        z += bias.to(z.dtype)
    if inputs.scale != 1.0:
        z *= inputs.scale
    if inputs.softcap is not None:
        z.div_(inputs.softcap).tanh_().mul_(inputs.softcap)
    return z


def _slope(inputs: LogprobInputs, z: Tensor) -> Tensor | None:
    """dz / d(scaled logit) = 1 - (z / softcap)^2; None where it is 1."""
    if inputs.softcap is None:
        return None
    return 1 - (z / inputs.softcap).square_()


def _labels_inside(labels: Tensor, words: slice) -> tuple[Tensor, Tensor]:
    """Rows whose label lies among `words`, and its place there."""
    rows = ((labels >= words.start) & (labels < words.stop)).nonzero().squeeze(1)
    return rows, labels[rows] - words.start


def _finite(m: Tensor) -> Tensor:
    """A maximum of -inf (every logit so far is -inf) would make exp(z - m) NaN; 0 serves as well."""
    return torch.where(m == -torch.inf, torch.zeros_like(m), m)


class _Softmax:
    """The softmax of one row tile, carried along the vocabulary.

    m is the running maximum, s the sum of exp(z - m), `weighted` the same sum with W (for u) and `z_sum`
    with z (for the entropy). The state starts from the label itself (m = z_y, s = 1), which is then left
    out of its tile: p_y comes from the exact logit even where the tiles are rounded to bf16.
    """

    def __init__(
        self, inputs: LogprobInputs, tile: slice, memory: _TileMemory, want_u: bool, want_entropy: bool
    ) -> None:
        self.inputs, self.memory, self.labels = inputs, memory, inputs.labels[tile]
        self.h = inputs.hidden_tile(tile)
        w_label = inputs.weight.index_select(0, self.labels).to(inputs.dtype)  # [t, H]
        bias = None if inputs.bias is None else inputs.bias.index_select(0, self.labels)
        exact = torch.linalg.vecdot(self.h.to(inputs.dtype), w_label)  # not rounded to the weight's dtype
        self.z_label = _finish_logits(inputs, exact, bias)
        self.m = self.z_label.clone()
        self.s = torch.exp(self.z_label - _finite(self.m))  # 1, or 0 for a forbidden label
        slope = _slope(inputs, self.z_label)
        self.grad_label = w_label if slope is None else w_label.mul_(slope.unsqueeze(1))
        self.weighted = self.grad_label * self.s.unsqueeze(1) if want_u else None  # [t, H]
        self.z_sum = torch.where(self.s > 0, self.s * self.z_label, self.s) if want_entropy else None

    def add(self, words: slice) -> None:
        """Take one tile of the vocabulary in."""
        z = _logits(self.inputs, self.memory, self.h, words)  # [t, v]
        z[_labels_inside(self.labels, words)] = -torch.inf
        m = torch.maximum(self.m, z.amax(dim=1))
        rescale = torch.exp(self.m - _finite(m))  # [t]
        slope = _slope(self.inputs, z)
        kept = z.clone() if self.z_sum is not None else None
        p = z.sub_(_finite(m).unsqueeze(1)).exp_()
        self.m, self.s = m, self.s * rescale + p.sum(dim=1)
        if self.z_sum is not None and kept is not None:
            self.z_sum = self.z_sum * rescale + torch.where(p > 0, p * kept, p).sum(dim=1)
        if self.weighted is not None:
            if slope is not None:
                p.mul_(slope.nan_to_num_())  # the label's -inf has no slope here
            w = self.inputs.weight[words]
            self.weighted.mul_(rescale.unsqueeze(1))
            low = self.memory.low(p)
            self.weighted += product_with(low, w.T)

    def u(self) -> Tensor:
        """dlogp/dh = scale * (slope_y W_y - sum_v p_v slope_v W_v)."""
        if self.weighted is None:
            raise RuntimeError("u was not asked for")
        return (self.grad_label - self.weighted / self.s.unsqueeze(1)) * self.inputs.scale


def _logit_gradient(
    inputs: LogprobInputs, z: Tensor, grad: Tensor, labels: Tensor, lse: Tensor, words: slice
) -> Tensor:
    """g * (onehot - p) * slope * scale for one tile z of logits, in place, [t, v]."""
    slope = _slope(inputs, z)
    dz = z.sub_(_finite(lse).unsqueeze(1)).exp_().neg_()
    dz[_labels_inside(labels, words)] += 1
    dz *= grad.unsqueeze(1) * inputs.scale
    return dz if slope is None else dz.mul_(slope)
