"""Log-probabilities of labels straight from hidden states, without the logits.

    z = softcap * tanh(logit_scale * (h W^T + b) / softcap)
    logp[t] = z[t, y_t] - logsumexp_v z[t, v]

The [M, V] logits of a 152k vocabulary are the largest tensor of a training step. Here they exist
only as tiles. `docs/kernels.md` has the derivation; `logprob_triton.py` is the path of 16-bit weights
on CUDA, `logprob_torch.py` that of everything else.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import logprob_torch
from .choice import Backend, forced_backend
from .logprob_inputs import check_shapes, labelled
from .native_bf16 import multiplies_bf16


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
    is float32, never rounded to the weight's dtype.

    Where the hidden states need a gradient, the forward also leaves
    u = dlogp/dh = W[y] - sum_v p_v W_v  [M, H] and their backward is one product g * u. Where the
    weight or bias needs one, the backward computes the tiles again for it. Same bits on every run.
    One operator for torch.compile, without a graph break. On CUDA it waits for the labels, as their
    number decides the size of the launches.

    Memory beyond inputs, outputs and u, T being the number of labelled rows:
    PyTorch: tiles of 1024 x 2048 logits. Triton: with t = min(T, 4096) rows at a time, 64 MiB for the
    tiles and t * (6 H + V / 21) bytes for u, hidden states that are gathered, and statistics. In the
    backward of a head that learns: 64 MiB, 2 T H bytes, and where T > 8192 once more 32 H KiB.

    Args:
        hidden_states: [M, H], floating point.
        lm_head_weight: [V, H]; may be tied to the embedding. Copied if it is not contiguous.
        labels: [M] int64 in [0, V) or `ignore_index`.
        bias: [V] or None.
        softcap: > 0 or None (Gemma 2's final logit soft-capping).
        logit_scale: factor on the logits before the cap.
        return_stats: return `LogprobOutput` with the log-sum-exp and the entropy as well.

    Raises:
        ValueError: shapes that do not fit, softcap <= 0, or a label outside [0, V).
        TypeError: labels that are not int64.
    """
    check_shapes(hidden_states, lm_head_weight, labels, bias, softcap)
    want_u = torch.is_grad_enabled() and hidden_states.requires_grad
    logp, lse, entropy, _ = _forward(
        hidden_states,
        lm_head_weight,
        labels,
        bias,
        softcap,
        float(logit_scale),
        ignore_index,
        want_u,
        return_stats,
    )
    return LogprobOutput(logp, lse, entropy) if return_stats else logp


def choose_backend(weight: Tensor, forced: Backend | None = None) -> tuple[Backend, str]:
    """The path that serves this weight, and why.

    Raises:
        ValueError: "triton" is forced with a weight that the Triton kernels do not take.
    """
    obstacle = _triton_obstacle(weight)
    if forced == "triton" and obstacle is not None:
        raise ValueError(f"linear_logprob has no Triton kernel for this: {obstacle}")
    if forced is not None:
        return forced, "forced"
    if weight.device.type != "cuda":
        return "pytorch", f"tiles through torch.matmul on {weight.device.type}"
    if obstacle is not None:
        return "pytorch", obstacle
    return "triton", f"{weight.dtype} tensor cores, logits never leave the chip"


def _triton_obstacle(weight: Tensor) -> str | None:
    if weight.dtype not in (torch.bfloat16, torch.float16):
        return f"lm_head_weight is {weight.dtype}, tensor cores take bfloat16 and float16"
    if weight.shape[1] % 16 != 0:
        return f"hidden size {weight.shape[1]} is not a multiple of 16"
    if find_spec("triton") is None:
        return "triton is not installed"
    if weight.device.type == "cuda" and not multiplies_bf16(weight.device):
        return "the GPU is older than compute capability 8.0"
    return None


# The operators: a static shape for each result, whatever the labels, and nothing but tensors and
# numbers as arguments. Results that were not asked for are empty.


@torch.library.custom_op(
    "qtrain::linear_logprob",
    mutates_args=(),
    schema="(Tensor hidden_states, Tensor weight, Tensor labels, Tensor? bias, float? softcap, "
    "float scale, SymInt ignore_index, bool want_u, bool want_entropy) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    ignore_index: int,
    want_u: bool,
    want_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp, lse, entropy [M], u [M, H]."""
    inputs = labelled(hidden_states, weight, labels, bias, softcap, scale, ignore_index)
    backend, _ = choose_backend(weight, forced_backend())
    with torch.autocast(weight.device.type, enabled=False):
        logp, lse, entropy, u = _path(backend).forward(inputs, want_u, want_entropy)
    return logp, lse, _or_empty(entropy, lse), _or_empty(u, hidden_states)


@torch.library.custom_op(
    "qtrain::linear_logprob_head_grad",
    mutates_args=(),
    schema="(Tensor grad, Tensor logp, Tensor lse, Tensor hidden_states, Tensor weight, Tensor labels, "
    "Tensor? bias, float? softcap, float scale, SymInt ignore_index, bool want_weight, bool want_bias, "
    "str? forced) -> (Tensor, Tensor)",
)
def _head_gradient(
    grad: Tensor,
    logp: Tensor,
    lse: Tensor,
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    ignore_index: int,
    want_weight: bool,
    want_bias: bool,
    forced: Backend | None,
) -> tuple[Tensor, Tensor]:
    """dW [V, H], db [V]."""
    inputs = labelled(hidden_states, weight, labels, bias, softcap, scale, ignore_index)
    backend, _ = choose_backend(weight, forced)
    with torch.autocast(weight.device.type, enabled=False):
        dw, db = _path(backend).head_gradient(inputs, grad, logp, lse, want_weight, want_bias)
    return _or_empty(dw, weight), _or_empty(db, weight if bias is None else bias)


def _path(backend: Backend) -> Any:
    """The module of a backend. Triton's is imported on first use: a CPU-only torch has no triton."""
    if backend == "pytorch":
        return logprob_torch
    from . import logprob_triton

    return logprob_triton


def _or_empty(result: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if result is None else result


@_forward.register_fake
def _(hidden_states: Tensor, weight: Tensor, labels: Tensor, *others: Any) -> tuple[Tensor, ...]:
    *_, want_u, want_entropy = others
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    logp, lse = (hidden_states.new_empty(labels.shape, dtype=dtype) for _ in range(2))
    entropy = torch.empty_like(lse) if want_entropy else None
    u = hidden_states.new_empty(hidden_states.shape) if want_u else None
    return logp, lse, _or_empty(entropy, lse), _or_empty(u, hidden_states)


@_head_gradient.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    _, _, _, _, weight, _, bias, *_, want_weight, want_bias, _ = arguments
    dw = weight.new_empty(weight.shape) if want_weight else None
    db = bias.new_empty(bias.shape) if bias is not None and want_bias else None
    return _or_empty(dw, weight), _or_empty(db, weight if bias is None else bias)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """What is kept for backward: u for the hidden states, the inputs for the head."""
    h, weight, labels, bias, *numbers, want_u, _ = inputs
    logp, lse, entropy, u = output
    ctx.mark_non_differentiable(lse, entropy, u)
    ctx.trainable_head = weight.requires_grad or (bias is not None and bias.requires_grad)
    ctx.numbers, ctx.want_u = numbers, want_u
    ctx.forced = forced_backend()  # backward may run in a thread of its own, outside the context
    ctx.save_for_backward(u, *((logp, lse, h, weight, labels, bias) if ctx.trainable_head else ()))


@once_differentiable
def _backward(ctx: Any, grad: Tensor, *_others: Tensor | None) -> tuple[Tensor | None, ...]:
    u, *saved = ctx.saved_tensors
    needs_h, needs_weight, _, needs_bias, *_ = ctx.needs_input_grad
    dh = dw = db = None
    if needs_h:
        if not ctx.want_u:
            raise RuntimeError("qtrain::linear_logprob: hidden_states need a gradient but want_u is False")
        dh = (u * grad.unsqueeze(1)).to(u.dtype)
    if ctx.trainable_head and (needs_weight or needs_bias):
        dw, db = _head_gradient(grad, *saved, *ctx.numbers, needs_weight, needs_bias, ctx.forced)
    return dh, dw if needs_weight else None, None, db if needs_bias else None, *[None] * 5


_forward.register_autograd(_backward, setup_context=_save)
