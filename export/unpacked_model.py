"""A folder of packed weights as a plain causal LM in memory, read by this project alone.

Where a format's own library is missing, transformers 5.24 loads a GPTQ folder without an error, and its
weights are random.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from .containers import HEAD
from .layer import set_parameter
from .nf4_base import empty_model
from .quantized_checkpoint import QuantizedCheckpoint


def unpacked_model(folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """W = s (q - z) of every packed module, rounded to `dtype`, and the other parameters, in eval mode.

    Args:
        folder: GPTQ (v1, v2), AWQ GEMM or compressed-tensors.

    Raises:
        ExportError: it is damaged or incomplete, or packed in a way that is not known here.
    """
    quantized = QuantizedCheckpoint.open(folder)
    quantized.check_complete()
    model = empty_model(folder)
    tied = f"{HEAD}.weight" if quantized.checkpoint.ties_embeddings else None
    for name in [name for name, _ in model.named_parameters() if name != tied]:
        set_parameter(model, name, quantized.weight(name).to(device, dtype, copy=True))
    model.tie_weights()
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
    vars(model.config).pop("quantization_config", None)
    model.config.dtype = dtype
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model
