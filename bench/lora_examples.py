"""Example launches of the LoRA kernels and of the NF4 dequantisation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from qtrain.kernels.specimens import Specimen

from .examples import Example, Shape, dtype_of, nbytes, poisoned

SCALING = 0.5
DROPOUT_P = 0.3
SEED = (77 << 32) | 0xFEDCBA98


def example(specimen: Specimen, shape: Shape, seed: int = 0) -> Example:
    """Inputs from a seed.

    Raises:
        KeyError: the specimen is of no kernel that this file knows.
    """
    builders = {
        "_forward_kernel": _forward,
        "_input_grad_kernel": _input_grad,
        "_project_kernel": _project,
        "_weight_grad_kernel": _weight_grad,
        "_dequantize_kernel": _dequantize,
    }
    return builders[specimen.kernel.__name__](specimen, shape, torch.Generator().manual_seed(seed))


def random_nf4(rows: int, columns: int, nested: bool, generator: torch.Generator) -> dict[str, Tensor]:
    """The kernels' pointers of a random NF4 weight in blocks of 64."""
    blocks = rows * columns // 64
    code = torch.linspace(-1, 1, 16).pow(3) + torch.randn(16, generator=generator) * 0.01
    packed = torch.randint(-(2**31), 2**31 - 1, (rows * columns // 8,), generator=generator)
    pointers = {"packed_ptr": packed.to(torch.int32), "code_ptr": code}
    if nested:
        return pointers | {
            "absmax_ptr": torch.randint(0, 256, (blocks,), generator=generator).to(torch.uint8),
            "absmax_code_ptr": torch.linspace(-1, 1, 256) ** 3,
            "absmax_scale_ptr": torch.rand(-(-blocks // 256), generator=generator),
            "absmax_offset_ptr": torch.full((1,), 1.5),
        }
    absmax = torch.rand(blocks, generator=generator) + 0.5
    return pointers | {"absmax_ptr": absmax} | dict.fromkeys(_NESTED, code)


_NESTED = ("absmax_code_ptr", "absmax_scale_ptr", "absmax_offset_ptr")


def decoded(pointers: dict[str, Tensor], rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The weight as the definition gives it: float32 products, one cast."""
    absmax = pointers["absmax_ptr"]
    if absmax.dtype == torch.uint8:
        scale = pointers["absmax_scale_ptr"].repeat_interleave(256)[: absmax.numel()]
        absmax = pointers["absmax_code_ptr"][absmax.long()] * scale + pointers["absmax_offset_ptr"]
    packed = pointers["packed_ptr"].view(torch.uint8)
    nibbles = torch.stack((packed >> 4, packed & 15), dim=1).flatten().long()
    return (pointers["code_ptr"][nibbles] * absmax.repeat_interleave(64)).to(dtype).view(rows, columns)


def _base(
    specimen: Specimen, rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[dict[str, Tensor], Tensor, int]:
    """(pointers, the weight [rows, columns], bytes that have to be read)."""
    if specimen.constexprs["NF4"]:
        pointers = random_nf4(rows, columns, bool(specimen.constexprs["NESTED"]), generator)
        return pointers, decoded(pointers, rows, columns, dtype), _nf4_bytes(pointers)
    dense = (torch.randn(rows, columns, generator=generator) / columns**0.5).to(dtype)
    names = ("packed_ptr", "absmax_ptr", "code_ptr", *_NESTED)
    return dict.fromkeys(names, dense), dense, nbytes(dense)


def _nf4_bytes(pointers: dict[str, Tensor]) -> int:
    return nbytes(*{id(tensor): tensor for tensor in pointers.values()}.values())


def keep_mask(rows: int, columns: int) -> Tensor:
    """Philox4x32-10 by the definition in `kernels/dropout_triton.py`, in numpy: keep [rows, columns]."""
    group, row = np.meshgrid(np.arange(columns // 4), np.arange(rows))
    zero = np.zeros_like(row, np.uint64)
    counter = [group.astype(np.uint64), row.astype(np.uint64), zero, zero]
    key = [SEED & 0xFFFFFFFF, SEED >> 32]
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        first, second = counter[0] * np.uint64(0xD2511F53), counter[2] * np.uint64(0xCD9E8D57)
        counter = [
            (second >> half) ^ counter[1] ^ np.uint64(key[0]),
            second & low,
            (first >> half) ^ counter[3] ^ np.uint64(key[1]),
            first & low,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    bits = np.stack(counter, axis=-1).reshape(rows, columns)
    return torch.from_numpy((bits >> np.uint64(1)) >= round(DROPOUT_P * 2**31))


def _dropout(specimen: Specimen, rows: int, columns: int) -> tuple[dict[str, Any], Tensor, float]:
    """(scalar arguments, keep as float64, 1 / (1 - p))."""
    if specimen.constexprs["DROPOUT"]:
        keep, drop_p = keep_mask(rows, columns).double(), DROPOUT_P
    else:
        keep, drop_p = torch.ones(rows, columns, dtype=torch.float64), 0.0
    low = SEED & 0xFFFFFFFF
    scalars = {"seed_low": low - 2**32, "seed_high": SEED >> 32, "drop_threshold": round(drop_p * 2**31)}
    return scalars, keep, 1 / (1 - drop_p)


def _tiles(shape: tuple[int, int], specimen: Specimen) -> tuple[int]:
    return (-(-shape[0] // specimen.constexprs["BM"]) * -(-shape[1] // specimen.constexprs["BN"]),)


def _forward(specimen: Specimen, shape: Shape, generator: torch.Generator) -> Example:
    rows, n, k, rank = shape.rows, shape.outputs, shape.inner, int(specimen.constexprs["RANK"])
    dtype = dtype_of(specimen, "x_ptr")
    pointers, weight, weight_bytes = _base(specimen, n, k, dtype, generator)
    x = torch.randn(rows, k, generator=generator).to(dtype)
    xa = torch.randn(rows, rank, generator=generator).to(dtype)
    lora_b = torch.randn(n, rank, generator=generator) / rank**0.5
    bias = torch.randn(n, generator=generator).to(dtype)
    y = poisoned(rows, n, dtype=dtype)
    scaled = (lora_b * SCALING).to(dtype).double()
    expected = x.double() @ weight.double().T + xa.double() @ scaled.T
    if specimen.constexprs["BIAS"]:
        expected += bias.double()
    arguments = {"x_ptr": x, **pointers, "xa_ptr": xa, "lora_b_ptr": lora_b, "bias_ptr": bias, "y_ptr": y}
    arguments |= {"scaling": SCALING, "rows": rows, "N": n, "K": k, "x_stride": k, "xa_stride": rank}
    ideal = weight_bytes + nbytes(x, xa, lora_b, bias, y)
    return Example(specimen, _tiles((rows, n), specimen), arguments, {"y_ptr": expected}, ideal)


def _input_grad(specimen: Specimen, shape: Shape, generator: torch.Generator) -> Example:
    rows, n, k, rank = shape.rows, shape.outputs, shape.inner, int(specimen.constexprs["RANK"])
    dtype = dtype_of(specimen, "dy_ptr")
    pointers, weight, weight_bytes = _base(specimen, n, k, dtype, generator)
    dy = torch.randn(rows, n, generator=generator).to(dtype)
    g = torch.randn(rows, max(rank, 1), generator=generator).to(dtype)
    factor = torch.randn(max(rank, 1), k, generator=generator) / max(rank, 1) ** 0.5
    factor = factor.to(dtype_of(specimen, "lora_a_ptr"))
    add = bool(specimen.constexprs["ADD"])
    dx = torch.randn(rows, k, generator=generator).to(dtype) if add else poisoned(rows, k, dtype=dtype)
    scalars, keep, keep_scale = _dropout(specimen, rows, k)
    expected = dy.double() @ weight.double()
    if add:
        expected += dx.double()
    if rank:
        expected += keep * keep_scale * (g.double() @ factor.to(dtype).double())
    arguments = {"dy_ptr": dy, **pointers, "g_ptr": g, "lora_a_ptr": factor, "dx_ptr": dx, **scalars}
    arguments |= {"rows": rows, "N": n, "K": k, "dy_stride": n, "keep_scale": keep_scale}
    ideal = weight_bytes + nbytes(dy, dx) + (nbytes(g, factor) if rank else 0) + (nbytes(dx) if add else 0)
    return Example(specimen, _tiles((rows, k), specimen), arguments, {"dx_ptr": expected}, ideal)


def _project(specimen: Specimen, shape: Shape, generator: torch.Generator) -> Example:
    constants = specimen.constexprs
    rows, k, rank, row_major = shape.rows, shape.inner, int(constants["RANK"]), bool(constants["ROW_MAJOR"])
    dtype = dtype_of(specimen, "x_ptr")
    x = torch.randn(rows, k, generator=generator).to(dtype)
    factor = torch.randn(*((rank, k) if row_major else (k, rank)), generator=generator) / k**0.5
    factor = factor.to(dtype_of(specimen, "factor_ptr"))
    out = poisoned(rows, rank, dtype=dtype)
    scalars, keep, keep_scale = _dropout(specimen, rows, k)
    alpha = keep_scale if row_major else SCALING
    right = factor.to(dtype).double()
    expected = alpha * ((keep * x.double()) @ (right.T if row_major else right))
    arguments = {"x_ptr": x, "factor_ptr": factor, "out_ptr": out, "rows": rows, "K": k, "x_stride": k}
    arguments |= {"out_stride": rank, "alpha": alpha, **scalars}
    grid = (-(-rows // constants["BM"]), -(-rank // constants["BR"]))
    return Example(specimen, grid, arguments, {"out_ptr": expected}, nbytes(x, factor, out))


def _weight_grad(specimen: Specimen, shape: Shape, generator: torch.Generator) -> Example:
    constants = specimen.constexprs
    rows, columns, rank = shape.rows, shape.inner, int(constants["RANK"])
    dtype = dtype_of(specimen, "big_ptr")
    small = torch.randn(rows, rank, generator=generator).to(dtype)
    big = torch.randn(rows, columns, generator=generator).to(dtype)
    scalars, keep, keep_scale = _dropout(specimen, rows, columns)
    row_major = bool(constants["ROW_MAJOR"])
    alpha = keep_scale if row_major else SCALING
    expected = alpha * (small.double().T @ (keep * big.double()))
    expected = expected if row_major else expected.T
    out = poisoned(*expected.shape, dtype=torch.float32)
    arguments = {"small_ptr": small, "big_ptr": big, "out_ptr": out, "rows": rows, "C": columns}
    arguments |= {"small_stride": rank, "big_stride": columns, "alpha": alpha, **scalars}
    grid = (columns // constants["BC"], -(-rank // constants["BR"]))
    return Example(specimen, grid, arguments, {"out_ptr": expected}, nbytes(small, big, out))


def _dequantize(specimen: Specimen, shape: Shape, generator: torch.Generator) -> Example:
    n, k, dtype = shape.outputs, shape.inner, dtype_of(specimen, "out_ptr")
    pointers = random_nf4(n, k, bool(specimen.constexprs["NESTED"]), generator)
    out = poisoned(n, k, dtype=dtype)
    grid = (-(-n * k // 8 // int(specimen.constexprs["WORDS"])),)
    arguments = {**pointers, "out_ptr": out, "groups": n * k // 64}
    expected = decoded(pointers, n, k, dtype).double()
    return Example(specimen, grid, arguments, {"out_ptr": expected}, _nf4_bytes(pointers) + nbytes(out))
