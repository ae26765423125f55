"""Packs the same integers with the code of GPTQModel and compressed-tensors; run by their interpreter.

    python pack_worker.py IN.safetensors OUT.safetensors

In: `q` [N, K], `zeros`, `scales` [N, G], `g_idx` [K]. Out: `gptq.*`, `awq.*` and `compressed-tensors.*`.
"""

from __future__ import annotations

import sys
from typing import Any


def main(source: str, out: str) -> None:
    """Pack with each of them."""
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
    from safetensors.torch import load_file, save_file

    given = load_file(source)
    q, zeros, scales, g_idx = (given[name] for name in ("q", "zeros", "scales", "g_idx"))
    groups = g_idx.long()
    weight = scales.float()[:, groups] * (q.float() - zeros.float()[:, groups])
    linear = torch.nn.Linear(q.shape[1], q.shape[0], bias=False)
    linear.weight.data = weight
    sizes: dict[str, Any] = {"in_features": q.shape[1], "out_features": q.shape[0], "bits": 4}
    sizes |= {"group_size": q.shape[1] // scales.shape[1], "sym": False}
    found = {}

    one = TorchLinear(**sizes, desc_act=True)
    one.pack(linear, scales.float(), zeros.float(), g_idx)
    convert_gptq_v2_to_v1_format_module(one, QuantizeConfig(bits=4, group_size=sizes["group_size"]))
    found |= {f"gptq.{name}": getattr(one, name) for name in ("qweight", "qzeros", "scales", "g_idx")}

    if bool((g_idx == torch.arange(q.shape[1]) // sizes["group_size"]).all()):
        other = AwqTorchLinear(**sizes, desc_act=False)
        other.pack(linear, scales.float(), zeros.float())
        found |= {f"awq.{name}": getattr(other, name) for name in ("qweight", "qzeros", "scales")}
        signed, offset = (q.to(torch.int8) - 8), (zeros.to(torch.int8) - 8)
        found["compressed-tensors.weight_packed"] = pack_to_int32(signed, 4)
        found["compressed-tensors.weight_zero_point"] = pack_to_int32(offset, 4, packed_dim=0)
    save_file({name: values.data.contiguous().cpu() for name, values in found.items()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
