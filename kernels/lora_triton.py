"""LoRA over a 4-bit or 16-bit base on a GPU: five products, each one launch.

    xa = drop(x) A^T                                    `down`            [M, R]
    y  = x W^T + bias + scaling xa B^T                  `forward`         [M, N]
    g  = scaling dy B                                   `up_grad`         [M, r]
    dB = scaling dy^T xa,   dA = g^T drop(x)            `weight_grads`
    dx = dy W + drop'(g A)                              `input_grad`      [M, K]

The low-rank term goes into the accumulator of the base product, NF4 is decoded in the main loop
(`nf4_triton.py`), dropout's mask comes from its seed wherever it is needed (`dropout_triton.py`). No
atomics: same bits on every run. Shapes: K and N are multiples of 64, anything else is refused by `obstacle`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from .dropout_triton import seed_words, threshold
from .lora_factor_triton import _project_kernel, _weight_grad_kernel
from .lora_gemm_triton import _forward_kernel, _input_grad_kernel
from .nf4 import NF4Weight
from .nf4_triton import NF4_SIGNATURE, dequantize, nf4_arguments
from .nf4_triton import obstacle as nf4_obstacle

STEP = 64  # of the reduction in every kernel; also NF4's block


@dataclass(frozen=True, slots=True)
class Tile:
    """A GEMM's launch configuration."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


# docs/kernels.md has the instruction counts that chose these
WIDE = Tile(128, 128, 8, 3)
NARROW = Tile(128, 64, 4, 3)  # two blocks fit a multiprocessor
GROUP = 8
PROJECT_ROWS = 32
WEIGHT_GRAD = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
# Above so many rows a separate dequantisation costs less than decoding the weight for each row tile again
DEQUANTIZE_ROWS = 4096


def obstacle(dtype: torch.dtype, weights: Sequence[Tensor | NF4Weight]) -> str | None:
    """Why the kernels can't serve layers that compute in `dtype`, or None."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{dtype}: tensor cores take bfloat16 and float16, cuBLAS serves the rest"
    for weight in weights:
        n, k = weight.shape
        if n % STEP or k % STEP:
            return f"the weight is {n} x {k}, the kernels take multiples of {STEP}"
        if isinstance(weight, NF4Weight):
            reason = nf4_obstacle(weight)
            if reason is not None:
                return reason
            if k % weight.blocksize:
                return f"blocks of {weight.blocksize} weights straddle its rows of {k}"
    return None


def base_path(rows: int, quantised: bool) -> tuple[str, str]:
    """(`fused` | `dequantize once` | `16-bit`, reason) for a product with the base weight."""
    if not quantised:
        return "16-bit", "the weight is read as it is"
    if rows > DEQUANTIZE_ROWS:
        return (
            "dequantize once",
            f"{rows} rows > {DEQUANTIZE_ROWS}: decoding for each row tile would cost more",
        )
    return "fused", f"{rows} rows <= {DEQUANTIZE_ROWS}: NF4 is decoded in the main loop"


def down(x: Tensor, lora_As: Sequence[Tensor], dropout_p: float, seed: int) -> Tensor:
    """drop(x) [A_1; A_2; ...]^T, [M, R], in one launch: x is read once for all of them."""
    factor = _stacked(lora_As, x.dtype)
    xa = torch.empty(x.shape[0], factor.shape[0], dtype=x.dtype, device=x.device)
    _project(x, factor, xa, 1 / (1 - dropout_p), True, dropout_p, seed)
    return xa


def up_grad(dy: Tensor, lora_B: Tensor, scaling: float, out: Tensor) -> None:
    """out = scaling dy B, [M, r]; `out` may be columns of a wider tensor."""
    _project(dy, lora_B.contiguous(), out, scaling, False, 0.0, 0)


def forward(
    x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None, xa: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    """x W^T + bias + scaling xa B^T, [M, N], in one launch (two where NF4 is dequantised once)."""
    (rows, k), (n, _) = x.shape, weight.shape
    y = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    if rows == 0:
        return y
    pointers, constants = _base(weight, rows, x.dtype)
    tile = _choose_tile(rows, n, x.device)
    _forward_kernel[(triton.cdiv(rows, tile.rows) * triton.cdiv(n, tile.columns),)](
        x_ptr=x,
        **pointers,
        xa_ptr=xa,
        lora_b_ptr=lora_B.contiguous(),
        bias_ptr=x if bias is None else bias,
        y_ptr=y,
        scaling=scaling,
        rows=rows,
        N=n,
        K=k,
        x_stride=x.stride(0),
        xa_stride=xa.stride(0),
        RANK=lora_B.shape[1],
        BIAS=bias is not None,
        **constants,
        **_options(tile),
    )
    return y


def input_grad(
    dys: Sequence[Tensor],
    weights: Sequence[Tensor | NF4Weight],
    g: Tensor,
    lora_As: Sequence[Tensor],
    dropout_p: float,
    seed: int,
) -> Tensor:
    """sum_i dy_i W_i + keep / (1 - p) (g [A_1; A_2; ...]), [M, K]; the launch of each i adds to dx."""
    rows, k = g.shape[0], weights[0].shape[1]
    dx = torch.empty(rows, k, dtype=g.dtype, device=g.device)
    if rows == 0:
        return dx
    factor = _stacked(lora_As, g.dtype)
    for index, (dy, weight) in enumerate(zip(dys, weights, strict=True)):
        first = index == 0
        pointers, constants = _base(weight, rows, g.dtype)
        tile = WIDE
        _input_grad_kernel[(triton.cdiv(rows, tile.rows) * triton.cdiv(k, tile.columns),)](
            dy_ptr=dy,
            **pointers,
            g_ptr=g,
            lora_a_ptr=factor,
            dx_ptr=dx,
            rows=rows,
            N=dy.shape[1],
            K=k,
            dy_stride=dy.stride(0),
            **_dropout_arguments(dropout_p if first else 0.0, seed),
            keep_scale=1 / (1 - dropout_p),
            RANK=g.shape[1] if first else 0,
            ADD=not first,
            **constants,
            **_options(tile),
        )
    return dx


def weight_grads(
    dys: Sequence[Tensor],
    xas: Sequence[Tensor],
    scalings: Sequence[float],
    g: Tensor,
    x: Tensor,
    dropout_p: float,
    seed: int,
) -> tuple[list[Tensor], Tensor]:
    """([scaling_i dy_i^T xa_i, [N_i, r_i]], g^T drop(x), [R, K]) in float32."""
    lora_Bs = []
    for dy, xa, scaling in zip(dys, xas, scalings, strict=True):
        grad = torch.empty(dy.shape[1], xa.shape[1], dtype=torch.float32, device=dy.device)
        _weight_grad(xa, dy, grad, scaling, False, 0.0, 0)
        lora_Bs.append(grad)
    lora_A = torch.empty(g.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
    _weight_grad(g, x, lora_A, 1 / (1 - dropout_p), True, dropout_p, seed)
    return lora_Bs, lora_A


def _project(
    x: Tensor, factor: Tensor, out: Tensor, alpha: float, row_major: bool, dropout_p: float, seed: int
) -> None:
    rows, rank = out.shape
    if rows == 0:
        return
    row_tiles = triton.cdiv(rows, PROJECT_ROWS)
    width = project_width(rank, row_tiles, multiprocessors(x.device), factor.dtype.itemsize)
    _project_kernel[(row_tiles, triton.cdiv(rank, width))](
        x_ptr=x,
        factor_ptr=factor,
        out_ptr=out,
        rows=rows,
        K=x.shape[1],
        x_stride=x.stride(0),
        out_stride=out.stride(0),
        alpha=alpha,
        **_dropout_arguments(dropout_p, seed),
        RANK=rank,
        ROW_MAJOR=row_major,
        BM=PROJECT_ROWS,
        BR=width,
        INTERPRET=triton.knobs.runtime.interpret,
        **project_options(width),
    )


def project_width(rank: int, row_tiles: int, sms: int, itemsize: int) -> int:
    """Ranks that one program computes: all of them (x is read once) where row tiles alone fill the GPU."""
    widest = 256 if itemsize < 4 else 128
    width = max(16, min(widest, triton.next_power_of_2(rank)))
    return width if 2 * row_tiles >= sms else min(width, 32)


def project_options(width: int) -> dict[str, Any]:
    return {
        "num_warps": 8 if width >= 128 else 4,  # four would spill with dropout on sm_120
        "num_stages": 3 if width <= 64 else 2,
        "enable_fp_fusion": True,
    }


def _dropout_arguments(dropout_p: float, seed: int) -> dict[str, Any]:
    """What a kernel that draws the mask is told of it."""
    low, high = seed_words(seed)
    return {
        "seed_low": low,
        "seed_high": high,
        "drop_threshold": threshold(dropout_p),
        "DROPOUT": dropout_p > 0,
    }


def _weight_grad(
    small: Tensor, big: Tensor, out: Tensor, alpha: float, row_major: bool, dropout_p: float, seed: int
) -> None:
    rank, columns = small.shape[1], big.shape[1]
    height = max(16, min(64, triton.next_power_of_2(rank)))
    _weight_grad_kernel[(triton.cdiv(columns, STEP), triton.cdiv(rank, height))](
        small_ptr=small,
        big_ptr=big,
        out_ptr=out,
        rows=small.shape[0],
        C=columns,
        small_stride=small.stride(0),
        big_stride=big.stride(0),
        alpha=alpha,
        **_dropout_arguments(dropout_p, seed),
        RANK=rank,
        ROW_MAJOR=row_major,
        BR=height,
        BC=STEP,
        INTERPRET=triton.knobs.runtime.interpret,
        **WEIGHT_GRAD,
    )


def _base(
    weight: Tensor | NF4Weight, rows: int, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, int | bool]]:
    """The base weight as pointers and constants: packed, or dense where the path says so."""
    if isinstance(weight, NF4Weight) and base_path(rows, True)[0] == "fused":
        pointers, constants = nf4_arguments(weight)
        return pointers, constants | {"NF4": True, "BLOCK": weight.blocksize}
    dense = dequantize(weight, dtype) if isinstance(weight, NF4Weight) else weight.contiguous()
    pointers = dict.fromkeys(NF4_SIGNATURE, dense)
    return pointers, {"NF4": False, "NESTED": False, "NESTED_BLOCK": 1, "BLOCK": STEP}


def _choose_tile(rows: int, columns: int, device: torch.device) -> Tile:
    """The wide tile where there are enough of them to fill the GPU."""
    tiles = triton.cdiv(rows, WIDE.rows) * triton.cdiv(columns, WIDE.columns)
    return WIDE if tiles >= multiprocessors(device) else NARROW


def multiprocessors(device: torch.device) -> int:
    """Of the device; an RTX 4090's 128 where the kernels run on CPU tensors."""
    if device.type != "cuda":
        return 128
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _options(tile: Tile) -> dict[str, int | bool]:
    return {
        "BM": tile.rows,
        "BN": tile.columns,
        "GROUP": GROUP,
        "INTERPRET": triton.knobs.runtime.interpret,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": False,  # a nested absmax is rounded after its product and after its sum
    }


def _stacked(lora_As: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """[A_1; A_2; ...], [R, K]: one as it is, several in the dtype of the product."""
    if len(lora_As) == 1:
        return lora_As[0].contiguous()
    stacked = torch.empty(
        sum(a.shape[0] for a in lora_As), lora_As[0].shape[1], dtype=dtype, device=lora_As[0].device
    )
    for part, lora_A in zip(stacked.split([a.shape[0] for a in lora_As]), lora_As, strict=True):
        part.copy_(lora_A)
    return stacked
