"""AutoGPTQ's format, version 1.

    qweight [K/per, N] int32   row r, bits `bits j` and up: q[n, per r + j], with per = 32 / bits
    qzeros  [G, N/per] int32   the same along N, of z - 1
    scales  [G, N]     float16
    g_idx   [K]        int32   the group of each column of W

Source: AutoGPTQ 0.7 (qlinear_cuda.py), GPTQModel's `FORMAT.GPTQ`. The stored z - 1 is why an asymmetric z
has to be 1 or more: readers disagree on a stored -1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ExportError
from .quantized import QuantizedLinear
from .scheme import FUSED, Scheme, check_shape
from .words import pack_columns, unpack_columns

CONFIG_FILE = "quantize_config.json"  # beside config.json's quantization_config, the same content


def pack(linear: QuantizedLinear, module: str) -> dict[str, Tensor]:
    """The module's tensors by their names behind `module.`; a bias stays as it is.

    Raises:
        ExportError: a shape that can't be packed, or a zero point of 0.
    """
    n, k = linear.q.shape
    check_shape(module, n, k, linear.scheme)
    zeros = linear.zero_points()
    if not bool(zeros.all()):
        raise ExportError(
            f"{module}: a zero point is 0, which GPTQ v1 stores as -1 and readers take for different values; "
            f"keep zero points in 1 .. {linear.scheme.top}"
        )
    return {
        "qweight": pack_columns(linear.q, linear.bits).t().contiguous(),  # [K/per, N]
        "qzeros": pack_columns((zeros - 1).t(), linear.bits),  # [G, N/per]
        "scales": linear.scales.t().contiguous(),  # [G, N]
        "g_idx": linear.groups_of_columns().clone(),  # [K]
    }


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedLinear:
    """The inverse of `pack`; a g_idx that is k // group_size becomes None.

    Raises:
        ExportError: a tensor is missing.
        ValueError: shapes that do not go together.
    """
    for name in ("qweight", "qzeros", "scales", "g_idx"):
        if name not in tensors:
            raise ExportError(f"a GPTQ module has no tensor {name}; it has {', '.join(sorted(tensors))}")
    q = unpack_columns(tensors["qweight"].t(), scheme.bits)
    zeros = (unpack_columns(tensors["qzeros"], scheme.bits) + 1).t().contiguous()
    if scheme.symmetric and not bool((zeros == scheme.middle).all()):
        raise ExportError(f"a symmetric GPTQ module has zero points other than {scheme.middle}")
    k = q.shape[1]
    trivial = torch.arange(k, dtype=torch.int32) // scheme.group_length(k)
    g_idx = None if torch.equal(tensors["g_idx"].cpu(), trivial) else tensors["g_idx"]
    scales = tensors["scales"].t().contiguous()
    return QuantizedLinear(
        q, scales, None if scheme.symmetric else zeros, g_idx, scheme.bits, scheme.group_size
    )


def config(
    scheme: Scheme,
    *,
    overrides: Mapping[str, Scheme] | None = None,
    skipped: Sequence[str] = (),
    lm_head: bool = False,
    damp_percent: float = 0.01,
    true_sequential: bool = True,
    meta: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """`quantization_config` of config.json, and the content of quantize_config.json.

    Args:
        scheme: of every module that is not named below.
        overrides: module -> a scheme of its own; written as GPTQModel's `dynamic`, which vLLM reads too.
        skipped: linear modules left in 16 bits, besides lm_head.
        lm_head: whether lm_head is quantised.
        damp_percent, true_sequential: how it was made; readers ignore them.
        meta: further facts for people, such as the quantizer's name and version.
    """
    found: dict[str, Any] = {
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "desc_act": scheme.desc_act,
        "sym": scheme.symmetric,
        "lm_head": lm_head,
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "format": "gptq",
        "pack_dtype": "int32",
        "damp_percent": damp_percent,
        "true_sequential": true_sequential,
    }
    dynamic = _dynamic(scheme, overrides or {}, skipped)
    if dynamic:
        found["dynamic"] = dynamic
    if meta:
        found["meta"] = dict(meta)
    return found


def _dynamic(
    scheme: Scheme, overrides: Mapping[str, Scheme], skipped: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """A pattern for each module: "-:" leaves it alone, "+:" changes what is said for it."""
    rules: dict[str, dict[str, Any]] = {}
    for module in _with_fused(skipped):
        rules[f"-:^{re.escape(module)}$"] = {}
    for other in dict.fromkeys(overrides.values()):
        usual = _named(scheme)
        changed = {key: value for key, value in _named(other).items() if value != usual[key]}
        if changed:
            modules = [module for module, its in overrides.items() if its == other]
            rules |= {f"+:^{re.escape(module)}$": changed for module in _with_fused(modules)}
    return rules


def _named(scheme: Scheme) -> dict[str, Any]:
    return {
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.symmetric,
        "desc_act": scheme.desc_act,
    }


def _with_fused(modules: Sequence[str]) -> list[str]:
    """The modules, and the name under which vLLM knows them where all parts of a fused layer are there."""
    names, found = set(modules), list(modules)
    for fused, parts in FUSED.items():
        for module in modules:
            parent, _, last = module.rpartition(".")
            if last == parts[0] and all(f"{parent}.{part}" in names for part in parts):
                found.append(f"{parent}.{fused}")
    return found
