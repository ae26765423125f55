"""The kernels of linear_logprob in every configuration that `logprob_triton` can choose."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from .logprob_gemm_triton import (
    _accumulate_kernel,
    _head_gradient_kernel,
    _logit_gradient_kernel,
    _statistics_kernel,
)
from .logprob_rows_triton import _finish_kernel, _units_kernel
from .logprob_triton import FINISH, HEAD, LIGHT, LOGITS, NARROW, UNITS_ROWS, WIDE, Gemm
from .specimens import Specimen

_FLOATS = frozenset({"scale", "softcap", "inv_cap"})
_ALIGNED = frozenset({"H", "padded"})  # multiples of 16; the other numbers are not specialised
_POINTERS = {"label_ptr": "*i32", "place_ptr": "*i64"}


def specimens() -> list[Specimen]:
    """Of the forward and of the head's gradient."""
    return [*_forward(), *_head(), *_rows()]


def _forward() -> Iterator[Specimen]:
    for dtype in ("bf16", "fp16"):
        low = dict.fromkeys(("h_ptr", "w_ptr", "p_ptr"), f"*{dtype}")
        for store in (False, True):
            yield _gemm(
                f"statistics{' and P' if store else ''} {dtype}",
                _statistics_kernel,
                low,
                LOGITS,
                {"STORE": store, "BM": LOGITS.rows, "BN": LOGITS.columns, "BK": LOGITS.step},
                hot=("h_ptr", "w_ptr", "p_ptr") if store else ("h_ptr", "w_ptr"),
                budget="logprob_forward",
            )
        for gemm in (WIDE, NARROW):
            yield _gemm(
                f"accumulate {dtype}",
                _accumulate_kernel,
                low,
                gemm,
                {"BM": gemm.rows, "BN": LOGITS.columns, "BH": gemm.columns, "BK": gemm.step},
                hot=("p_ptr", "w_ptr", "u_ptr"),
                budget="logprob_accumulate",
            )


def _head() -> Iterator[Specimen]:
    for dtype in ("bf16", "fp16"):
        low = dict.fromkeys(("h_ptr", "w_ptr", "dz_ptr", "dw_ptr"), f"*{dtype}")
        yield _gemm(
            f"logit gradient {dtype}",
            _logit_gradient_kernel,
            low,
            LOGITS,
            {"BM": LOGITS.rows, "BN": LOGITS.columns, "BK": LOGITS.step},
            hot=("h_ptr", "w_ptr"),  # dz as well, but for the label's own, one a row
            budget="logprob_forward",
        )
        yield _gemm(
            f"head gradient {dtype}",
            _head_gradient_kernel,
            low,
            HEAD,
            {"BN": LOGITS.columns, "BV": HEAD.rows, "BH": HEAD.columns, "BK": HEAD.step},
            hot=("dz_ptr", "h_ptr", "dw_ptr"),
            budget="bf16_gemm",
        )


def _gemm(
    name: str,
    kernel: Any,
    pointers: dict[str, str],
    gemm: Gemm,
    constants: dict[str, Any],
    *,
    hot: tuple[str, ...],
    budget: str,
) -> Specimen:
    return Specimen(
        name=f"linear_logprob {name} {gemm.rows}x{gemm.columns}x{gemm.step}",
        kernel=kernel,
        signature=_signature(kernel, pointers),
        constexprs={**constants, "INTERPRET": False},
        aligned=_aligned(kernel),
        num_warps=gemm.num_warps,
        num_stages=gemm.num_stages,
        budget=budget,
        hot=hot,
        options={"enable_fp_fusion": True},
    )


def _rows() -> Iterator[Specimen]:
    yield _light("units", _units_kernel, {}, {"BM": UNITS_ROWS}, ())
    for dtype in ("bf16", "fp16"):
        low = dict.fromkeys(("h_ptr", "w_ptr"), f"*{dtype}")
        for u, gemm in product((None, dtype, "fp32"), (WIDE, NARROW)):
            yield _light(
                f"finish {dtype}{'' if u is None else f' u {u}'} {gemm.columns}",
                _finish_kernel,
                {**low, "u_ptr": f"*{u or 'fp32'}"},
                {"WANT_U": u is not None, "BH": gemm.columns, **FINISH},
                ("h_ptr", "w_ptr", "weighted_ptr", "u_ptr") if u else ("h_ptr", "w_ptr"),
            )


def _light(
    name: str, kernel: Any, pointers: dict[str, str], constants: dict[str, Any], hot: tuple[str, ...]
) -> Specimen:
    options = dict(LIGHT)
    return Specimen(
        name=f"linear_logprob {name}",
        kernel=kernel,
        signature=_signature(kernel, pointers),
        constexprs=constants,
        aligned=_aligned(kernel),
        num_warps=int(options.pop("num_warps")),
        num_stages=int(options.pop("num_stages")),
        budget="light",
        hot=hot,
        options=options,
    )


def _signature(kernel: Any, pointers: dict[str, str]) -> dict[str, str]:
    def kind(name: str) -> str:
        if name.endswith("_ptr"):
            return pointers.get(name, _POINTERS.get(name, "*fp32"))
        return "fp32" if name in _FLOATS else "i32"

    return {param.name: kind(param.name) for param in kernel.params if not param.is_constexpr}


def _aligned(kernel: Any) -> frozenset[str]:
    names = {param.name for param in kernel.params if not param.is_constexpr}
    return frozenset(name for name in names if name.endswith("_ptr") or name in _ALIGNED)
