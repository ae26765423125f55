"""Quantised model folders with random weights, and the model that they stand for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtrain.export.checkpoint import Checkpoint
from qtrain.export.formats import awq, compressed_tensors, gptq
from qtrain.export.formats.quantized import QuantizedLinear
from qtrain.export.formats.scheme import Scheme
from qtrain.export.rounding.curvature import ActOrder, curvature
from qtrain.export.rounding.linear import Rounding, round_linear
from qtrain.export.structure import find_structure
from qtrain.export.tensors import TensorSpec
from qtrain.export.writer import CheckpointWriter
from tests.export.folders import save_model

# vLLM's kernels ask for features in multiples of 32 and heads of 64; groups of 128 for columns to divide
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.08,
}


PACK = {"gptq": gptq.pack, "awq": awq.pack, "compressed-tensors": compressed_tensors.pack}


@dataclass(frozen=True, slots=True)
class Case:
    """A format with a scheme in it.

    Attributes:
        format: gptq, awq or compressed-tensors.
        order: of columns; `full` writes a g_idx.
    """

    format: str
    scheme: Scheme
    rounding: Rounding = "gptq"
    order: ActOrder = "static"

    @property
    def name(self) -> str:
        """For people and folders."""
        signs = "sym" if self.scheme.symmetric else "asym"
        order = "" if self.rounding == "nearest" else f"-{self.order}"
        return f"{self.format}-{signs}-g{self.scheme.group_size}-{self.rounding}{order}"


def write_case(base: Path, out: Path, case: Case) -> dict[str, QuantizedLinear]:
    """Quantise every linear of the decoder layers of `base`, on made-up activations, into `out`."""
    structure = find_structure(base)
    checkpoint = Checkpoint.open(base)
    linears = {}
    for module in structure.linears():
        weight = checkpoint.tensor(f"{module}.weight")
        linears[module] = _quantize(weight, case)
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.specs}
    for module, linear in linears.items():
        del tensors[f"{module}.weight"]
        packed = PACK[case.format](linear, module)
        tensors |= {f"{module}.{suffix}": values for suffix, values in packed.items()}
    tensors = {
        name: values.half() if values.is_floating_point() else values for name, values in tensors.items()
    }
    config = _config(case)
    with CheckpointWriter(out) as writer:
        specs = [TensorSpec.of(name, values) for name, values in tensors.items()]
        writer.write(specs, lambda spec: (tensors[spec.name],))
        if case.format == "gptq":
            writer.write_json(gptq.CONFIG_FILE, config)
        writer.seal(checkpoint.config | {"dtype": "float16", "quantization_config": config})
        writer.publish()
    return linears


def _quantize(weight: Tensor, case: Case) -> QuantizedLinear:
    seed = torch.Generator().manual_seed(weight.shape[1])
    mix = torch.randn(weight.shape[1], weight.shape[1], generator=seed) / weight.shape[1] ** 0.5
    x = torch.randn(2 * weight.shape[1], weight.shape[1], generator=seed) @ (torch.eye(weight.shape[1]) + mix)
    x *= torch.rand(weight.shape[1], generator=seed) + 0.1  # so that an order of activation means something
    found = curvature(x.t() @ x, order=case.order)
    lowest = 1 if case.format == "gptq" else 0
    return round_linear(weight.float(), found, case.scheme, rounding=case.rounding, lowest_zero=lowest).linear


def _config(case: Case) -> dict[str, Any]:
    configs = {"gptq": gptq.config, "awq": awq.config, "compressed-tensors": compressed_tensors.config}
    skipped = {"skipped": ["lm_head"]} if case.format != "gptq" else {}
    found: dict[str, Any] = configs[case.format](case.scheme, **skipped)
    return found


def save_base(folder: Path, **changes: Any) -> Path:
    """A random Qwen2 in fp16: 2 layers of hidden 256, 4 heads of 64."""
    return save_model(folder, "qwen2", dtype=torch.float16, shard="1GB", **(SIZES | changes))


def reference_model(base: Path, linears: dict[str, QuantizedLinear]) -> Any:
    """`base` in float32 with the dequantised weights."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for module, linear in linears.items():
            model.get_submodule(module).weight.copy_(linear.dequantize())
    return model.eval()


def asked_for() -> bool:
    """Whether the readers are to be run: they take minutes, also where they are installed."""
    return os.environ.get("QTRAIN_INTEROP") == "1"
