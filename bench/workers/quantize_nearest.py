"""Round to nearest, the baseline that needs no calibration, in the formats that the others write.

Symmetric: s = 2 max|w| / 15, q = clamp(round(w / s) + 8, 0, 15), as GPTQ v1. Asymmetric: s = (max - min) / 15
with 0 within the range, z = round(-min / s), q = clamp(round(w / s) + z, 0, 15), as AWQ GEMM. For each group
of columns, in float32, with the scale rounded to the float16 that is stored first.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from qtrain.export.checkpoint import Checkpoint
from qtrain.export.formats import awq, gptq
from qtrain.export.formats.quantized import QuantizedLinear
from qtrain.export.formats.scheme import Scheme
from qtrain.export.tensors import write_whole

from .quantizing import Job, measured, read_job

TOP = 15
TINY = 6e-8  # float16's smallest positive number: a group of zeros


def nearest(weight: Tensor, scheme: Scheme) -> QuantizedLinear:
    """Of one matrix [N, K]."""
    n, k = weight.shape
    grouped = weight.to(torch.float32).view(n, -1, scheme.group_length(k))  # [N, G, g]
    if scheme.symmetric:
        scales = (2 * grouped.abs().amax(-1) / TOP).clamp_min(TINY).to(torch.float16)
        offset = torch.full_like(scales, scheme.middle, dtype=torch.float32)
    else:
        low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
        scales = ((high - low) / TOP).clamp_min(TINY).to(torch.float16)
        offset = (-low / scales.to(torch.float32)).round().clamp(0, TOP)
    q = (grouped / scales.to(torch.float32)[..., None]).round().add_(offset[..., None]).clamp_(0, TOP)
    zeros = None if scheme.symmetric else offset.to(torch.uint8)
    return QuantizedLinear(q.to(torch.uint8).view(n, k), scales, zeros, None, 4, scheme.group_size)


def main() -> None:
    """Every matrix of the decoder layers."""
    job = read_job()
    scheme = Scheme(4, job.group_size, job.symmetric)
    with measured(job, {"format": "gptq" if job.symmetric else "awq"}):
        write(job, scheme)


def write(job: Job, scheme: Scheme) -> None:
    """The checkpoint's folder."""
    source = Checkpoint.open(job.model)
    form = gptq if scheme.symmetric else awq
    tensors: dict[str, Tensor] = {}
    for name, spec in source.specs.items():
        values = source.tensor(name)
        if ".layers." in name and len(spec.shape) == 2:
            module = name.removesuffix(".weight")
            packed = form.pack(nearest(values, scheme), module)
            tensors |= {f"{module}.{suffix}": part for suffix, part in packed.items()}
        else:
            tensors[name] = values
    job.checkpoint.mkdir(parents=True)
    write_whole(job.checkpoint / "model.safetensors", tensors)
    config = source.config | {"quantization_config": form.config(scheme), "dtype": "float16"}
    (job.checkpoint / "config.json").write_text(json.dumps(config))
    for extra in ("tokenizer.json", "tokenizer_config.json"):
        if (job.model / extra).is_file():
            shutil.copy(Path(job.model / extra), job.checkpoint)


if __name__ == "__main__":
    main()
