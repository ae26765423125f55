"""AutoAWQ's GEMM format.

    qweight [K, N/8] int32   word c, bits 4i and up: q[8c + ORDER[i], k]
    qzeros  [G, N/8] int32   the same, of z
    scales  [G, N]   float16

Source: AutoAWQ 0.2.9 (linear/gemm.py). 4 bits only; the groups are columns side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..errors import ExportError
from .quantized import QuantizedLinear
from .scheme import Scheme, check_shape
from .words import pack_columns, unpack_columns

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # output columns, lowest bits first


def check_scheme(scheme: Scheme) -> None:
    """Refuse what the format has no place for.

    Raises:
        ExportError: bits other than 4, or an activation order.
    """
    if scheme.bits != 4:
        raise ExportError(f"AWQ GEMM holds 4 bits, not {scheme.bits}; use --format compressed-tensors for 8")
    if scheme.desc_act:
        raise ExportError(
            "AWQ GEMM has no g_idx: groups are neighbouring columns; use --act-order static or off"
        )


def pack(linear: QuantizedLinear, module: str) -> dict[str, Tensor]:
    """The module's tensors by their names behind `module.`; a bias stays as it is.

    Raises:
        ExportError: a shape or scheme that the format can't hold.
    """
    check_scheme(linear.scheme)
    n, k = linear.q.shape
    check_shape(module, n, k, linear.scheme)
    return {
        "qweight": pack_columns(linear.q.t(), 4, ORDER),  # [K, N/8]
        "qzeros": pack_columns(linear.zero_points().t(), 4, ORDER),  # [G, N/8]
        "scales": linear.scales.t().contiguous(),  # [G, N]
    }


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedLinear:
    """The inverse of `pack`.

    Raises:
        ExportError: a tensor is missing.
        ValueError: shapes that do not go together.
    """
    for name in ("qweight", "qzeros", "scales"):
        if name not in tensors:
            raise ExportError(f"an AWQ module has no tensor {name}; it has {', '.join(sorted(tensors))}")
    q = unpack_columns(tensors["qweight"], 4, ORDER).t().contiguous()
    zeros = unpack_columns(tensors["qzeros"], 4, ORDER).t().contiguous()
    scales = tensors["scales"].t().contiguous()
    return QuantizedLinear(q, scales, None if scheme.symmetric else zeros, None, 4, scheme.group_size)


def config(
    scheme: Scheme, *, skipped: Sequence[str] = (), meta: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """`quantization_config` of config.json.

    `zero_point` is true for symmetric weights as well: the zero points are stored either way (8), and
    vLLM's kernels for the format read it no other way. `skipped` are linear modules left in 16 bits; readers
    take the names as parts of module names. The format has one scheme for all others.
    """
    check_scheme(scheme)
    found: dict[str, Any] = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": scheme.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": list(skipped) or None,
    }
    if meta:
        found["meta"] = dict(meta)
    return found
