"""The correctness gate of the kernel timings: a variant that computes something else gets no speed.

Compared with the definition in float64, on evenly spaced rows and columns: up to 256 of each, so that of a
tensor of 16384 x 18944 they are 64 and 74 apart and every tile of 128 x 128 is looked into.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qtrain.kernels import reference

from .kernel_data import TORCH_DTYPES, Data, HeadData, LoraData, Quantised
from .kernel_shapes import Case

SAMPLES = 256
TOKENS = 64  # of the log-probs: each costs a product with the whole head
CHUNK = 8192  # rows of a head, or of a batch, in float64 at a time

# A plain path rounds its result up to five times (base, A x, B A x, scaling, sum), each time by at most half
# an eps of the value, and by a third of that in the root mean square. Values reach five times their rms.
RMS_EPS, MAX_EPS = 2, 16
# Dropout is checked by its law (see `check_dropout`), within half: a wrong p or scaling is off by more.
DROPOUT_SLACK = 0.5


@dataclass(frozen=True)
class Expected:
    """Part of one result: `value` is what stands at (rows, columns); an error is measured against `scale`."""

    rows: Tensor
    columns: Tensor | None
    value: Tensor  # float64
    scale: float
    lora: Tensor | None = None  # the part of `value` that dropout acts on

    def of(self, found: Tensor) -> Tensor:
        """The same places of a variant's result, float64."""
        found = found.detach()[self.rows]
        return (found if self.columns is None else found[:, self.columns]).double()


def expected(case: Case, data: Data) -> dict[str, Expected]:
    """What every result of the op is without dropout, by name."""
    if isinstance(data, HeadData):
        return _log_probs(data)
    if case.op == "nf4_dequantize":
        (weight,) = (_dense(w, case) for w in data.weights)
        every = torch.arange(weight.shape[0], device=weight.device)
        # all of it; an error of one unit in the last place (a contracted multiply-add) passes, no more
        return {"w": Expected(every, None, weight, 0.0)}
    return _lora(case, data)


def check(case: Case, wanted: Mapping[str, Expected], found: Mapping[str, Tensor]) -> str | None:
    """Why the results are not to be trusted, in one line, or None."""
    for name, tensor in found.items():
        target = wanted[name]
        value = target.of(tensor)
        if value.shape != target.value.shape:
            return f"wrong: {name} has shape {tuple(tensor.shape)}"
        if case.op == "nf4_dequantize":
            ulps = (value - target.value).abs() / target.value.abs().clamp_min(1e-30)
            limit = torch.finfo(TORCH_DTYPES[case.dtype]).eps
            if not bool((ulps <= limit).all()):
                return f"wrong: {name} is off by {float(ulps.max()):.2g} of its value, bound {limit:.2g}"
            continue
        error = (value - target.value) / target.scale
        rms, most = float(error.square().mean().sqrt()), float(error.abs().max())
        eps = tolerance(case)
        if not (rms <= RMS_EPS * eps and most <= MAX_EPS * eps):
            return (
                f"wrong: {name} is off by {rms:.2g} (rms) and {most:.2g} (most) of its scale, "
                f"bounds {RMS_EPS * eps:.2g} and {MAX_EPS * eps:.2g}"
            )
    return None


def errors(wanted: Mapping[str, Expected], found: Mapping[str, Tensor]) -> dict[str, float]:
    """Root mean square error of each result, relative to its scale (to its rms for a dequantised weight)."""
    sizes: dict[str, float] = {}
    for name, tensor in found.items():
        target = wanted[name]
        scale = target.scale or _rms(target.value)
        sizes[name] = _rms(target.of(tensor) - target.value) / scale
    return sizes


def tolerance(case: Case) -> float:
    """One eps of the dtype, and the float32 accumulation over the longest sum."""
    longest = max(case.rows, case.inner, sum(case.columns) if case.lora else 0)
    accumulated = torch.finfo(torch.float32).eps * longest**0.5
    return float(torch.finfo(TORCH_DTYPES[case.dtype]).eps + accumulated)


def check_dropout(case: Case, wanted: Mapping[str, Expected], found: Mapping[str, Tensor]) -> str | None:
    """Whether results under dropout scatter as they must; every variant draws a mask of its own.

    An element kept with probability 1 - p and divided by it has variance p / (1 - p), and the data's signs
    are random: so the low-rank part of every result, gradients included, changes by sqrt(p / (1 - p)) of its
    own root mean square.
    """
    law = (case.dropout_p / (1 - case.dropout_p)) ** 0.5
    for name, tensor in found.items():
        target = wanted[name]
        if target.lora is None:
            continue
        ratio = _rms(target.of(tensor) - target.value) / _rms(target.lora)
        if not abs(ratio / law - 1) <= DROPOUT_SLACK:
            return (
                f"wrong: dropout {case.dropout_p} changes {name} by {ratio:.2f} of its low-rank part, "
                f"expected {law:.2f}"
            )
    return None


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def _spread(size: int, device: torch.device, limit: int = SAMPLES) -> Tensor:
    """Evenly spaced indices, both ends included."""
    if size <= limit:
        return torch.arange(size, device=device)
    return torch.linspace(0, size - 1, limit, dtype=torch.float64, device=device).round().long()


def _dense(weight: Tensor | Quantised, case: Case) -> Tensor:
    """W as the ops see it: decoded in float32, rounded once to the dtype of x; float64."""
    if isinstance(weight, Tensor):
        return weight.double()
    state = weight.state
    absmax = state.state2.code[state.absmax.long()]
    absmax = absmax * state.state2.absmax.repeat_interleave(state.state2.blocksize)[: absmax.numel()]
    decoded = reference.nf4_dequantize(
        weight.packed, absmax + state.offset, state.code, state.blocksize, tuple(state.shape)
    )
    return decoded.to(TORCH_DTYPES[case.dtype]).double()


def _lora(case: Case, data: LoraData) -> dict[str, Expected]:
    x, s, device = data.x.detach(), data.scaling, data.x.device
    rows, inner = _spread(x.shape[0], device), _spread(x.shape[1], device)
    picked = x[rows].double()
    found: dict[str, Expected] = {}
    dx = torch.zeros(len(rows), len(inner), dtype=torch.float64, device=device)
    dx_lora = torch.zeros_like(dx)
    for index, (weight, a32, b32, dy) in enumerate(
        zip(data.weights, data.lora_As, data.lora_Bs, data.dys, strict=True)
    ):
        a, b, w = a32.detach().double(), b32.detach().double(), _dense(weight, case)
        columns = _spread(w.shape[0], device)
        lora = s * (picked @ a.T @ b[columns].T)
        found[f"y{index}"] = _entry(rows, columns, picked @ w[columns].T + lora, lora)
        g = s * (dy[rows].double() @ b)
        dx_lora += g @ a[:, inner]
        dx += dy[rows].double() @ w[:, inner]
        dA = torch.zeros(a.shape[0], len(inner), dtype=torch.float64, device=device)
        dB = torch.zeros(len(columns), a.shape[0], dtype=torch.float64, device=device)
        for x_part, dy_part in zip(torch.split(x, CHUNK), torch.split(dy, CHUNK), strict=True):
            dA += s * (dy_part.double() @ b).T @ x_part[:, inner].double()
            dB += s * dy_part[:, columns].double().T @ (x_part.double() @ a.T)
        every = torch.arange(a.shape[0], device=device)
        found[f"dA{index}"] = _entry(every, inner, dA, dA)
        found[f"dB{index}"] = _entry(columns, every, dB, dB)
    found["dx"] = _entry(rows, inner, dx + dx_lora, dx_lora)
    return found


def _entry(rows: Tensor, columns: Tensor, value: Tensor, lora: Tensor) -> Expected:
    return Expected(rows, columns, value, _rms(value), lora)


def _log_probs(data: HeadData) -> dict[str, Expected]:
    """logp, u = dlogp / dh, and dh = g u."""
    h, device = data.hidden.detach(), data.hidden.device
    tokens = _spread(h.shape[0], device, TOKENS)
    picked, labels = h[tokens].double(), data.labels[tokens]
    parts = torch.split(data.weight, CHUNK)
    logits = torch.cat([picked @ part.double().T for part in parts], dim=1)  # [T, V]
    logp = logits.log_softmax(dim=1)
    u = data.weight[labels].double()
    for part, p in zip(parts, torch.split(logp.exp(), CHUNK, dim=1), strict=True):
        u -= p @ part.double()
    dh = u * data.grad[tokens].double().unsqueeze(1)
    chosen = logp.gather(1, labels.unsqueeze(1)).squeeze(1)
    return {
        # an error of a log-prob is that of its logit
        "logp": Expected(tokens, None, chosen, _rms(logits)),
        "u": Expected(tokens, None, u, _rms(u)),
        "dh": Expected(tokens, None, dh, _rms(dh)),
    }
