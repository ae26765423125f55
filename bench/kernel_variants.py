"""The ways to compute each op that are timed side by side: ours, eager PyTorch, torch.compile, the peers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qtrain.kernels import (
    force_backend,
    linear_logprob,
    lora_linear,
    lora_linear_group,
    nf4_dequantize,
)

from .kernel_data import TORCH_DTYPES, Data, HeadData, LoraData, Quantised
from .kernel_shapes import Case
from .variants import AGAIN, OURS

PYTORCH = "qtrain (pytorch)"
APART = "qtrain (each alone)"
EAGER = "eager PyTorch"
COMPILED = "torch.compile"
PEFT = "peft"
PEFT_4BIT = "peft + bitsandbytes"
BITSANDBYTES = "bitsandbytes"
LIGER = "liger-kernel"
LIGER_SUM = "liger-kernel (sum)"
TRL = "TRL"


@dataclass(frozen=True)
class Operation:
    """One variant of one case, ready to run.

    `names` are those of the results (None: not compared), `gradients` those of the gradients of `leaves`.
    """

    forward: Callable[[], tuple[Tensor, ...]]
    names: tuple[str | None, ...]
    leaves: tuple[Tensor, ...] = ()
    gradients: tuple[str, ...] = ()
    upstream: tuple[Tensor, ...] = ()

    def backward(self, results: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Gradients of the leaves."""
        return torch.autograd.grad(results, self.leaves, self.upstream)


Build = Callable[[Case, Any, float], Operation]


@dataclass(frozen=True)
class Variant:
    """A row of the table.

    `missing` says why it can't run on a kind of device, with the remedy where there is one; `needs` is an
    estimate of the bytes that it adds, for machines that kill instead of refusing.
    """

    name: str
    build: Build
    missing: Callable[[str], str | None] = lambda _device: None
    needs: Callable[[Case], int] = lambda _case: 0

    @property
    def ours(self) -> bool:
        """Whether it is this project's."""
        return self.name.startswith(OURS)


def lora_operation(
    case: Case,
    data: LoraData,
    forward: Callable[[], tuple[Tensor, ...]],
    lora_As: Sequence[Tensor] | None = None,
    lora_Bs: Sequence[Tensor] | None = None,
) -> Operation:
    """With the results and gradients of a LoRA op; the factors are the data's unless given."""
    count = range(len(case.columns))
    return Operation(
        forward,
        tuple(f"y{i}" for i in count),
        (data.x, *(lora_As or data.lora_As), *(lora_Bs or data.lora_Bs)),
        ("dx", *(f"dA{i}" for i in count), *(f"dB{i}" for i in count)),
        tuple(data.dys),
    )


def head_operation(data: HeadData, forward: Callable[[], Tensor]) -> Operation:
    """With log-probs [M] as results, and the gradient of the hidden states: the head is frozen."""
    return Operation(lambda: (forward(),), ("logp",), (data.hidden,), ("dh",), (data.grad,))


def ours(case: Case, data: Data, dropout_p: float) -> Operation:
    """The public op."""
    if isinstance(data, HeadData):
        return head_operation(data, lambda: _tensor(linear_logprob(data.hidden, data.weight, data.labels)))
    weights = [w.view if isinstance(w, Quantised) else w for w in data.weights]
    if case.op == "nf4_dequantize":
        quantised = _quantised(data)
        dtype = TORCH_DTYPES[case.dtype]
        return Operation(lambda: (nf4_dequantize(quantised.view, dtype),), ("w",))
    scalings = [data.scaling] * len(weights)

    def one() -> tuple[Tensor, ...]:
        (a,), (b,) = data.lora_As, data.lora_Bs
        return (lora_linear(data.x, weights[0], a, b, data.scaling, dropout_p=dropout_p),)

    def group() -> tuple[Tensor, ...]:
        return lora_linear_group(data.x, weights, data.lora_As, data.lora_Bs, scalings, dropout_p=dropout_p)

    return lora_operation(case, data, one if case.op == "lora_linear" else group)


def ours_in_pytorch(case: Case, data: Data, dropout_p: float) -> Operation:
    """The public op, held to its PyTorch path."""
    operation = ours(case, data, dropout_p)

    def forward() -> tuple[Tensor, ...]:
        with force_backend("pytorch"):
            return operation.forward()

    return Operation(forward, operation.names, operation.leaves, operation.gradients, operation.upstream)


def ours_apart(case: Case, data: LoraData, dropout_p: float) -> Operation:
    """A group's layers one by one."""
    weights = [w.view if isinstance(w, Quantised) else w for w in data.weights]
    layers = list(zip(weights, data.lora_As, data.lora_Bs, strict=True))
    return lora_operation(
        case,
        data,
        lambda: tuple(lora_linear(data.x, w, a, b, data.scaling, dropout_p=dropout_p) for w, a, b in layers),
    )


def eager(case: Case, data: Data, dropout_p: float) -> Operation:
    """The definition as one would write it down."""
    return _plain(case, data, dropout_p, lambda function: function)


def compiled(case: Case, data: Data, dropout_p: float) -> Operation:
    """`torch.compile` of the eager op at this very shape."""
    torch._dynamo.reset()  # a cache of its own for each case: the limit of recompilations is never met
    return _plain(case, data, dropout_p, lambda function: torch.compile(function, dynamic=False))


def _plain(
    case: Case, data: Data, dropout_p: float, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Operation:
    if isinstance(data, HeadData):
        log_probs = wrap(_eager_log_probs)
        return head_operation(data, lambda: log_probs(data.hidden, data.weight, data.labels))
    if case.op == "nf4_dequantize":
        state, packed = _quantised(data).state, _quantised(data).packed
        decode = wrap(_eager_dequantize)
        dtype = TORCH_DTYPES[case.dtype]
        parts = (packed, state.absmax, state.state2.code, state.state2.absmax, state.offset, state.code)
        sizes = (state.state2.blocksize, state.blocksize, tuple(state.shape), dtype)
        return Operation(lambda: (decode(*parts, *sizes),), ("w",))
    layer = wrap(_eager_lora)
    layers = list(zip(data.weights, data.lora_As, data.lora_Bs, strict=True))
    return lora_operation(
        case,
        data,
        lambda: tuple(layer(data.x, w, a, b, data.scaling, dropout_p) for w, a, b in layers),
    )


def _eager_lora(
    x: Tensor, weight: Tensor | Quantised, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout_p: float
) -> Tensor:
    if isinstance(weight, Quantised):
        from bitsandbytes.functional import dequantize_4bit

        dense = dequantize_4bit(weight.packed, weight.state)
    else:
        dense = weight
    dropped = functional.dropout(x, dropout_p, training=dropout_p > 0)
    low = functional.linear(functional.linear(dropped, lora_A.to(x.dtype)), lora_B.to(x.dtype))
    return functional.linear(x, dense) + scaling * low


def _eager_log_probs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = functional.linear(hidden, weight).float()
    return logits.log_softmax(dim=-1).gather(1, labels.unsqueeze(1)).squeeze(1)


def _eager_dequantize(
    packed: Tensor,
    absmax: Tensor,
    absmax_code: Tensor,
    absmax_scale: Tensor,
    offset: Tensor,
    code: Tensor,
    absmax_block: int,
    block: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    scales = absmax_scale.repeat_interleave(absmax_block)[: absmax.numel()]
    steps = absmax_code[absmax.int()] * scales + offset
    flat = packed.flatten()
    nibbles = torch.stack((flat >> 4, flat & 15), dim=1).flatten()
    return (code[nibbles.int()].view(-1, block) * steps.unsqueeze(1)).to(dtype).view(shape)


def _logits_bytes(case: Case) -> int:
    """Logits in the head's dtype, in float32, their log-softmax, and the gradient of one of those."""
    return case.rows * case.columns[0] * (2 + 3 * 4) if case.op == "linear_logprob" else 0


def _tensor(result: Any) -> Tensor:
    assert isinstance(result, Tensor)
    return result


def _quantised(data: LoraData) -> Quantised:
    (weight,) = data.weights
    assert isinstance(weight, Quantised)
    return weight


def variants_of(case: Case, device: str) -> list[Variant]:
    """Every variant of the case, ours first; those that make no sense there are not listed."""
    from . import kernel_peers as peers

    found = [Variant(OURS, ours), Variant(AGAIN, ours)]
    if device == "cuda":
        found.append(Variant(PYTORCH, ours_in_pytorch))
    if case.op == "lora_linear_group":
        found.append(Variant(APART, ours_apart))
    found += [
        Variant(EAGER, eager, needs=_logits_bytes),
        Variant(COMPILED, compiled, needs=_logits_bytes),
    ]
    if case.lora and case.base == "nf4":
        found.append(Variant(PEFT_4BIT, peers.peft, peers.needs_package("peft", "bitsandbytes")))
    elif case.lora:
        found.append(Variant(PEFT, peers.peft, peers.needs_package("peft")))
    if case.op == "nf4_dequantize":
        found.append(Variant(BITSANDBYTES, peers.bitsandbytes))
    if case.op == "linear_logprob":
        found += [
            Variant(LIGER, peers.liger, peers.liger_missing),
            Variant(LIGER_SUM, peers.liger_sum, peers.liger_missing),
            Variant(TRL, peers.trl, peers.needs_package("trl")),
        ]
    return found


VARIANT_NAMES = (
    OURS,
    AGAIN,
    PYTORCH,
    APART,
    EAGER,
    COMPILED,
    PEFT_4BIT,
    PEFT,
    BITSANDBYTES,
    LIGER,
    LIGER_SUM,
    TRL,
)
