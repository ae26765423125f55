"""compressed-tensors' pack-quantized format (W4A16, W8A16).

    weight_packed     [N, K/per] int32   word c, bits `bits j` and up: q[n, per c + j], with per = 32 / bits
    weight_scale      [N, G]     float16
    weight_zero_point [N/per, G] int32   packed along N, of z; only where asymmetric
    weight_shape      [2]        int64   (N, K)

The library stores signed values plus 2^(bits-1), which is q itself. Source: compressed-tensors 0.20
(compressors/pack_quantized). `actorder: group` was removed there: groups are neighbouring columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ExportError
from .quantized import QuantizedLinear
from .scheme import Scheme, check_shape
from .words import pack_columns, unpack_columns


def check_scheme(scheme: Scheme) -> None:
    """Refuse what the format has no place for.

    Raises:
        ExportError: an activation order that needs a g_idx.
    """
    if scheme.desc_act:
        raise ExportError("compressed-tensors has no g_idx any more; use --act-order static or off")


def pack(linear: QuantizedLinear, module: str) -> dict[str, Tensor]:
    """The module's tensors by their names behind `module.`; a bias stays as it is.

    Raises:
        ExportError: a shape or scheme that the format can't hold.
    """
    check_scheme(linear.scheme)
    n, k = linear.q.shape
    check_shape(module, n, k, linear.scheme)
    tensors = {
        "weight_packed": pack_columns(linear.q, linear.bits),  # [N, K/per]
        "weight_scale": linear.scales.clone(),  # [N, G]
        "weight_shape": torch.tensor([n, k], dtype=torch.int64),
    }
    if linear.zeros is not None:
        zeros = pack_columns(linear.zeros.t(), linear.bits)  # [G, N/per]
        tensors["weight_zero_point"] = zeros.t().contiguous()  # [N/per, G]
    return tensors


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedLinear:
    """The inverse of `pack`.

    Raises:
        ExportError: a tensor is missing, or the scheme and the zero points do not go together.
        ValueError: shapes that do not go together.
    """
    for name in ("weight_packed", "weight_scale", "weight_shape"):
        if name not in tensors:
            raise ExportError(
                f"a pack-quantized module has no tensor {name}; it has {', '.join(sorted(tensors))}"
            )
    if scheme.symmetric == ("weight_zero_point" in tensors):
        raise ExportError("symmetric pack-quantized modules have no weight_zero_point, asymmetric ones have")
    q = unpack_columns(tensors["weight_packed"], scheme.bits)
    if list(q.shape) != tensors["weight_shape"].tolist():
        raise ValueError(
            f"weight_shape is {tensors['weight_shape'].tolist()}, but {list(q.shape)} are packed"
        )
    zeros = None
    if not scheme.symmetric:
        zeros = unpack_columns(tensors["weight_zero_point"].t(), scheme.bits).t().contiguous()
    return QuantizedLinear(q, tensors["weight_scale"], zeros, None, scheme.bits, scheme.group_size)


def config(
    scheme: Scheme, *, overrides: Mapping[str, Scheme] | None = None, skipped: Sequence[str] = ()
) -> dict[str, Any]:
    """`quantization_config` of config.json.

    `overrides` gives modules a scheme of their own; `skipped` are linear modules left in 16 bits.
    """
    groups = {"group_0": _group(["Linear"], scheme)}
    others = {its: None for its in (overrides or {}).values() if its != scheme}
    for number, other in enumerate(others, start=1):
        modules = [module for module, its in (overrides or {}).items() if its == other]
        groups[f"group_{number}"] = _group(modules, other)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(skipped),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _group(targets: list[str], scheme: Scheme) -> dict[str, Any]:
    check_scheme(scheme)
    whole_rows = scheme.group_size == -1
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if whole_rows else "group",
        "group_size": None if whole_rows else scheme.group_size,
        "dynamic": False,
    }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": "pack-quantized",
    }
