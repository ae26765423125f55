"""The LoRA kernels in every configuration that `lora_triton` can choose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .lora_factor_triton import _project_kernel, _weight_grad_kernel
from .lora_gemm_triton import _forward_kernel, _input_grad_kernel
from .lora_triton import GROUP, NARROW, PROJECT_ROWS, STEP, WEIGHT_GRAD, WIDE, Tile, project_options
from .nf4_triton import NF4_SIGNATURE
from .specimens import Specimen

_SCALARS = frozenset({"rows", "seed_low", "seed_high", "drop_threshold", "scaling", "alpha", "keep_scale"})
_SEED = {"seed_low": "i32", "seed_high": "i32", "drop_threshold": "i32"}
# base weight -> the constants that say so
_BASES: dict[str, dict[str, int | bool]] = {
    "nf4 nested": {"NF4": True, "NESTED": True, "NESTED_BLOCK": 256, "BLOCK": 64},
    "nf4": {"NF4": True, "NESTED": False, "NESTED_BLOCK": 1, "BLOCK": 64},
    "16-bit": {"NF4": False, "NESTED": False, "NESTED_BLOCK": 1, "BLOCK": STEP},
}


def specimens() -> list[Specimen]:
    """Of forward, input_grad, down, up_grad and weight_grads."""
    return [*_forward(), *_input_grad(), *_project(), *_weight_grad()]


def _forward() -> Iterator[Specimen]:
    for dtype in ("bf16", "fp16"):
        for base in _BASES:
            for tile in (WIDE, NARROW):
                yield _forward_specimen(dtype, base, tile, 64, bias=True)
    yield _forward_specimen("bf16", "nf4 nested", WIDE, 64, bias=False)
    for rank in (8, 32, 128):  # a low-rank step of 16, of 32, and two steps of 64
        yield _forward_specimen("bf16", "nf4 nested", WIDE, rank, bias=True)


def _forward_specimen(dtype: str, base: str, tile: Tile, rank: int, *, bias: bool) -> Specimen:
    signature = {"x_ptr": f"*{dtype}", **_base_signature(base, dtype)}
    signature |= {"xa_ptr": f"*{dtype}", "lora_b_ptr": "*fp32", "bias_ptr": f"*{dtype}", "y_ptr": f"*{dtype}"}
    signature |= {
        "scaling": "fp32",
        "rows": "i32",
        "N": "i32",
        "K": "i32",
        "x_stride": "i32",
        "xa_stride": "i32",
    }
    return Specimen(
        name=f"lora_linear forward {base} {dtype} {tile.rows}x{tile.columns}x{STEP} r={rank}"
        + ("" if bias else " no bias"),
        kernel=_forward_kernel,
        signature=signature,
        constexprs={"RANK": rank, "BIAS": bias, **_BASES[base], **_tile(tile)},
        aligned=_aligned(signature, "xa_stride", rank),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        budget="bf16_gemm" if base == "16-bit" else "nf4_gemm",
        hot=("x_ptr", "packed_ptr", "y_ptr"),
        options={"enable_fp_fusion": False},
    )


def _input_grad() -> Iterator[Specimen]:
    for dtype in ("bf16", "fp16"):
        for base in _BASES:
            yield _input_grad_specimen(dtype, base, 64, dropout=True, add=False)
    yield _input_grad_specimen("bf16", "nf4 nested", 64, dropout=False, add=False)
    yield _input_grad_specimen("bf16", "nf4 nested", 8, dropout=True, add=False)
    for dtype in ("bf16", "fp16"):
        yield _input_grad_specimen(dtype, "nf4 nested", 192, dropout=True, add=False)  # q, k and v
    for base in ("nf4 nested", "16-bit"):
        yield _input_grad_specimen("bf16", base, 0, dropout=False, add=True)


def _input_grad_specimen(dtype: str, base: str, rank: int, *, dropout: bool, add: bool) -> Specimen:
    signature = {"dy_ptr": f"*{dtype}", **_base_signature(base, dtype)}
    factor = "*fp32" if 0 < rank <= 128 else f"*{dtype}"  # those of a group are stacked in the dtype of dy
    signature |= {"g_ptr": f"*{dtype}", "lora_a_ptr": factor, "dx_ptr": f"*{dtype}"}
    signature |= {"rows": "i32", "N": "i32", "K": "i32", "dy_stride": "i32", **_SEED, "keep_scale": "fp32"}
    return Specimen(
        name=f"lora_linear input_grad {base} {dtype} {WIDE.rows}x{WIDE.columns}x{STEP} "
        + ("add" if add else f"r={rank}")
        + (" dropout" if dropout else ""),
        kernel=_input_grad_kernel,
        signature=signature,
        constexprs={"RANK": rank, "DROPOUT": dropout, "ADD": add, **_BASES[base], **_tile(WIDE)},
        aligned=_aligned(signature),
        num_warps=WIDE.num_warps,
        num_stages=WIDE.num_stages,
        budget="bf16_gemm" if base == "16-bit" else "nf4_gemm",
        hot=("dy_ptr", "packed_ptr", "dx_ptr"),
        options={"enable_fp_fusion": False},
    )


def _project() -> Iterator[Specimen]:
    for width in (16, 32, 64, 128):
        yield _project_specimen("bf16", "fp32", width, width, down=True, dropout=True)
        yield _project_specimen("bf16", "fp32", width, width, down=False, dropout=False)
    yield _project_specimen("bf16", "fp32", 64, 64, down=True, dropout=False)
    yield _project_specimen("fp16", "fp32", 64, 64, down=True, dropout=True)
    for rank, width in ((192, 32), (96, 128), (192, 256)):  # groups, their factors stacked in the dtype of x
        yield _project_specimen("bf16", "bf16", rank, width, down=True, dropout=True)
    yield _project_specimen("fp16", "fp16", 192, 32, down=True, dropout=True)
    for down in (True, False):
        yield _project_specimen("bf16", "fp32", 8, 16, down=down, dropout=down)


def _project_specimen(
    dtype: str, factor: str, rank: int, width: int, *, down: bool, dropout: bool
) -> Specimen:
    signature = {"x_ptr": f"*{dtype}", "factor_ptr": f"*{factor}", "out_ptr": f"*{dtype}", "rows": "i32"}
    signature |= {"K": "i32", "x_stride": "i32", "out_stride": "i32", "alpha": "fp32", **_SEED}
    return Specimen(
        name=f"lora_linear {'down' if down else 'up_grad'} {dtype} {PROJECT_ROWS}x{width}x{STEP} r={rank}"
        + (" group" if factor != "fp32" else "")
        + (" dropout" if dropout else ""),
        kernel=_project_kernel,
        signature=signature,
        constexprs={
            "RANK": rank,
            "ROW_MAJOR": down,
            "DROPOUT": dropout,
            "BM": PROJECT_ROWS,
            "BR": width,
            "INTERPRET": False,
        },
        aligned=_aligned(signature, "out_stride", rank),
        budget="light",
        hot=("x_ptr", "factor_ptr"),
        **_options(project_options(width)),
    )


def _weight_grad() -> Iterator[Specimen]:
    for height in (16, 32, 64):
        yield _weight_grad_specimen("bf16", height, height, transposed=False, dropout=True)
        yield _weight_grad_specimen("bf16", height, height, transposed=True, dropout=False)
    yield _weight_grad_specimen("bf16", 64, 64, transposed=False, dropout=False)
    yield _weight_grad_specimen("bf16", 192, 64, transposed=False, dropout=True)
    yield _weight_grad_specimen("fp16", 64, 64, transposed=False, dropout=True)
    for transposed in (True, False):
        yield _weight_grad_specimen("bf16", 8, 16, transposed=transposed, dropout=not transposed)


def _weight_grad_specimen(dtype: str, rank: int, height: int, *, transposed: bool, dropout: bool) -> Specimen:
    signature = {
        "small_ptr": f"*{dtype}",
        "big_ptr": f"*{dtype}",
        "out_ptr": "*fp32",
        "rows": "i32",
        "C": "i32",
    }
    signature |= {"small_stride": "i32", "big_stride": "i32", "alpha": "fp32", **_SEED}
    return Specimen(
        name=f"lora_linear {'dB' if transposed else 'dA'} {dtype} {height}x{STEP}x64 r={rank}"
        + (" dropout" if dropout else ""),
        kernel=_weight_grad_kernel,
        signature=signature,
        constexprs={
            "RANK": rank,
            "ROW_MAJOR": not transposed,
            "DROPOUT": dropout,
            "BR": height,
            "BC": STEP,
            "INTERPRET": False,
        },
        aligned=_aligned(signature, "small_stride", rank),
        budget="light",
        hot=("big_ptr", "out_ptr"),
        **_options(WEIGHT_GRAD),
    )


def _base_signature(base: str, dtype: str) -> dict[str, str]:
    signature = dict(NF4_SIGNATURE)
    if base == "nf4":
        signature["absmax_ptr"] = "*fp32"
    return dict.fromkeys(signature, f"*{dtype}") if base == "16-bit" else signature


def _tile(tile: Tile) -> dict[str, int | bool]:
    return {"BM": tile.rows, "BN": tile.columns, "GROUP": GROUP, "INTERPRET": False}


def _options(launch: dict[str, Any]) -> dict[str, Any]:
    """A launch's options as fields of a specimen."""
    others = {name: value for name, value in launch.items() if name not in ("num_warps", "num_stages")}
    return {"num_warps": launch["num_warps"], "num_stages": launch["num_stages"], "options": others}


def _aligned(signature: dict[str, str], rank_stride: str = "", rank: int = 0) -> frozenset[str]:
    """What is a multiple of 16 whatever the shape; `rank_stride` is the stride of [M, rank]."""
    unaligned = {rank_stride} if rank % 16 else set()
    return frozenset(signature) - _SCALARS - unaligned
