"""The peers' ops on the data of a case. Nothing of theirs is imported before it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from .kernel_data import TORCH_DTYPES, HeadData, LoraData, Quantised
from .kernel_shapes import Case
from .kernel_variants import Operation, head_operation, lora_operation

# package -> (module, what pip installs): the versions that these adapters were written for
PACKAGES = {
    "peft": ("peft", "peft"),
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    "trl": ("trl", "trl==1.16.0"),
    "liger-kernel": ("liger_kernel", "liger-kernel==0.8.5"),
}
TRL_CHUNK = 32768  # words of a tile, as TRL's trainers call the op


def needs_package(*names: str) -> Callable[[str], str | None]:
    """A check for packages that names the command which installs the first that is not here."""

    def missing(_device: str) -> str | None:
        for name in names:
            module, requirement = PACKAGES[name]
            if find_spec(module) is None:
                return f"not installed: pip install {requirement}"
        return None

    return missing


def liger_missing(device: str) -> str | None:
    """liger-kernel's kernels are Triton's."""
    return needs_package("liger-kernel")(device) or (None if device == "cuda" else "runs on a GPU only")


def peft(case: Case, data: LoraData, dropout_p: float) -> Operation:
    """peft's own LoRA layers over `bitsandbytes.nn.Linear4bit` or `torch.nn.Linear`, adapters in float32.

    As its trainers run it: in training mode, 16-bit dtypes under autocast.
    """
    from peft import LoraConfig, inject_adapter_in_model

    dtype = TORCH_DTYPES[case.dtype]
    bases = nn.ModuleDict({f"layer{i}": _base_layer(w, dtype) for i, w in enumerate(data.weights)})
    bases.is_loaded_in_4bit = case.base == "nf4"  # type: ignore[assignment]  # as transformers marks a model
    config = LoraConfig(
        r=case.rank,
        lora_alpha=case.rank * data.scaling,
        lora_dropout=dropout_p,
        target_modules=list(bases),
    )
    layers: list[Any] = list(inject_adapter_in_model(config, bases).values())
    for layer, a, b in zip(layers, data.lora_As, data.lora_Bs, strict=True):
        layer.lora_A["default"].weight = nn.Parameter(a.detach().clone())
        layer.lora_B["default"].weight = nn.Parameter(b.detach().clone())
        layer.train()

    def forward() -> tuple[Tensor, ...]:
        with torch.autocast(data.x.device.type, dtype, enabled=dtype.itemsize == 2):
            return tuple(layer(data.x) for layer in layers)

    return lora_operation(
        case,
        data,
        forward,
        [layer.lora_A["default"].weight for layer in layers],
        [layer.lora_B["default"].weight for layer in layers],
    )


def _base_layer(weight: Tensor | Quantised, dtype: torch.dtype) -> nn.Module:
    if isinstance(weight, Tensor):
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=False)
        return plain
    from bitsandbytes.nn import Linear4bit, Params4bit

    n, k = weight.view.shape
    layer = Linear4bit(k, n, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
    layer.weight = Params4bit(
        weight.packed,
        requires_grad=False,
        quant_state=weight.state,
        blocksize=weight.state.blocksize,
        compress_statistics=True,
        quant_type="nf4",
        bnb_quantized=True,
        module=layer,
    )
    layer.quant_state = weight.state
    return layer


def bitsandbytes(case: Case, data: LoraData, _dropout_p: float) -> Operation:
    """`bitsandbytes.functional.dequantize_4bit`."""
    from bitsandbytes.functional import dequantize_4bit

    (weight,) = data.weights
    assert isinstance(weight, Quantised)
    assert weight.state.dtype == TORCH_DTYPES[case.dtype]  # the dtype that it decodes to
    packed, state = weight.packed, weight.state
    return Operation(lambda: (dequantize_4bit(packed, state),), ("w",))


def liger(_case: Case, data: HeadData, _dropout_p: float) -> Operation:
    """Fused linear cross entropy with a loss per token; its backward computes the logits again."""
    return head_operation(data, lambda: -_liger_loss(data, "none"))


def liger_sum(_case: Case, data: HeadData, _dropout_p: float) -> Operation:
    """The same with one loss for all tokens: gradients in the forward, and no weight for each token."""
    one = torch.ones((), device=data.hidden.device)
    return Operation(lambda: (-_liger_loss(data, "sum"),), (None,), (data.hidden,), ("u",), (one,))


def _liger_loss(data: HeadData, reduction: str) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(data.hidden, data.weight, data.labels, reduction=reduction)


def trl(_case: Case, data: HeadData, _dropout_p: float) -> Operation:
    """TRL's chunked log-probs with no further outputs, as in DPO."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    return head_operation(
        data,
        lambda: ChunkedLogProbFunction.apply(
            data.hidden, data.weight, None, data.labels, 1.0, TRL_CHUNK, None, 1.0, ()
        )[0],
    )
