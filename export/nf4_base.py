"""The base as a 4-bit run saw it: NF4 of the 16-bit weights, dequantised, bit for bit bitsandbytes'."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtrain.kernels import NF4Weight, nf4_dequantize

from .errors import ExportError


@dataclass(frozen=True, slots=True)
class NF4Settings:
    """How a run held its base.

    Attributes:
        double_quant: absmax is quantised as well.
        compute_dtype: weights are cast to it before they are quantised, and come back in it.
        blocksize: weights that share an absmax.
    """

    double_quant: bool = True
    compute_dtype: torch.dtype = torch.bfloat16
    blocksize: int = 64


def nf4_round_trip(weight: Tensor, settings: NF4Settings) -> Tensor:
    """dequantize(quantize(weight)), [N, K] in settings.compute_dtype, on the weight's device."""
    from bitsandbytes.functional import quantize_4bit

    cast = weight.to(settings.compute_dtype).contiguous()
    packed, state = quantize_4bit(
        cast, blocksize=settings.blocksize, compress_statistics=settings.double_quant, quant_type="nf4"
    )
    return nf4_dequantize(NF4Weight.from_quant_state(packed, state))


def nf4_modules(folder: Path) -> list[str]:
    """The linear modules that transformers holds in 4 bits when it loads the model so.

    That is all of them but the output head, found by transformers' own rule on the module tree.
    """
    from bitsandbytes.nn import Linear4bit
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import HfQuantizer

    model = empty_model(folder)
    kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    replace_with_bnb_linear(model, kept, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    return [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]


def empty_model(folder: Path) -> Any:
    """The module tree of a model folder: parameters on `meta`, buffers real.

    Code that a folder brings along is never run.

    Raises:
        ExportError: transformers has no such architecture, or config.json has values that it can't take.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder)
        with init_empty_weights(include_buffers=False):
            return AutoModelForCausalLM.from_config(config).eval()
    except Exception as error:  # of whatever kind: a wrong value is found where transformers uses it
        reason = " ".join(str(error).split())
        if not isinstance(error, (ValueError, OSError)):
            reason = f"{type(error).__name__}: {reason}"
        raise ExportError(
            f"{folder}: transformers can't build this architecture ({reason}); "
            "Qwen2, Qwen3, Llama and Mistral are supported"
        ) from error
