"""NF4 weights as bitsandbytes stores them, and their dequantisation.

    W.flatten()[i] = code[nibble(i)] * absmax[i // blocksize]

Two weights lie in a byte, the one with the even index in the high nibble. Nested ("double quantised"),
absmax is 8-bit itself: absmax[b] = code2[absmax8[b]] * absmax2[b // blocksize2] + offset. All of it is
float32 arithmetic, each operation rounded, with one cast at the end: bit for bit what bitsandbytes
computes. Source: Dettmers et al. 2023, QLoRA, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .choice import forced_backend, triton_serves

CHUNK = 1 << 17  # weights: their float32 values stay in a core's second-level cache


@dataclass(frozen=True, slots=True)
class NF4Weight:
    """A frozen [N, K] weight in NF4; a view of somebody's tensors, no copy.

    Raises:
        ValueError: tensors whose dtype or size is not that of the layout.
    """

    packed: Tensor  # [N * K / 2] uint8
    absmax: Tensor  # [ceil(N * K / blocksize)] float32, or uint8 where nested
    code: Tensor  # [16] float32
    blocksize: int
    shape: tuple[int, int]  # (N, K)
    dtype: torch.dtype  # of the weight that was quantised
    absmax_code: Tensor | None = None  # [256] float32, where nested
    absmax_scale: Tensor | None = None  # [ceil(blocks / absmax_blocksize)] float32
    absmax_offset: Tensor | None = None  # [] float32
    absmax_blocksize: int = 0

    def __post_init__(self) -> None:
        n, k = self.shape
        if n < 1 or k < 2 or k % 2:
            raise ValueError(
                f"shape is {self.shape}, must be (N, K) with an even K: a byte holds two of a row"
            )
        if self.blocksize < 2 or self.blocksize & (self.blocksize - 1):
            raise ValueError(f"blocksize is {self.blocksize}, must be a power of two")
        blocks = -(-n * k // self.blocksize)
        _expect("packed", self.packed, torch.uint8, n * k // 2)
        _expect("absmax", self.absmax, torch.uint8 if self.nested else torch.float32, blocks)
        _expect("code", self.code, torch.float32, 16)
        if self.nested:
            _expect("absmax_code", self.absmax_code, torch.float32, 256)
            _expect("absmax_scale", self.absmax_scale, torch.float32, -(-blocks // self.absmax_blocksize))
            _expect("absmax_offset", self.absmax_offset, torch.float32, 1)

    @property
    def nested(self) -> bool:
        """Whether absmax is quantised as well ("double quantisation")."""
        return self.absmax_blocksize > 0

    @classmethod
    def from_params4bit(cls, weight: Any) -> NF4Weight:
        """View a `bitsandbytes.nn.Params4bit`.

        Raises:
            ValueError: it is not quantised yet, is FP4, transposed, or repacked for another kernel.
        """
        state = getattr(weight, "quant_state", None)
        if state is None:
            raise ValueError("weight has no quant_state: it is quantised when it is moved to its device")
        return cls.from_quant_state(weight.data, state)

    @classmethod
    def from_quant_state(cls, packed: Tensor, state: Any) -> NF4Weight:
        """View a packed tensor and its `bitsandbytes.functional.QuantState`.

        Raises:
            ValueError: FP4, a transposed or repacked tensor, or a shape that is not (N, K) with an even K.
        """
        if state.quant_type != "nf4":
            raise ValueError(f"quant_type is {state.quant_type}, must be nf4")
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError("weight is in bitsandbytes' layout for avx512_bf16, which has no backward")
        if packed.dim() == 2 and packed.shape[1] != 1:
            raise ValueError(f"packed is {tuple(packed.shape)}, must be [N * K / 2, 1]: it is transposed")
        if len(state.shape) != 2:
            raise ValueError(f"shape is {tuple(state.shape)}, must be (N, K)")
        inner = state.state2
        nested = () if inner is None else (inner.code, inner.absmax, state.offset, inner.blocksize)
        return cls(
            packed.view(torch.uint8).view(-1),  # FSDP stores the bytes under another dtype
            state.absmax,
            state.code,
            state.blocksize,
            (int(state.shape[0]), int(state.shape[1])),
            state.dtype,
            *nested,
        )


def _expect(name: str, tensor: Tensor | None, dtype: torch.dtype, count: int) -> None:
    if tensor is None:
        raise ValueError(f"{name} is missing: a nested absmax is decoded with it")
    if tensor.dtype != dtype or tensor.numel() != count or not tensor.is_contiguous():
        found = f"{tuple(tensor.shape)} {tensor.dtype}"
        raise ValueError(f"{name} is {found}, must be {count} contiguous elements of {dtype}")


def nf4_dequantize(weight: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """W[i // K, i % K] = code[nibble(i)] * absmax[i // blocksize], [N, K], cast once to `dtype`.

    Bit for bit what bitsandbytes computes. `dtype` is that of the quantised weight
    unless given: float16, bfloat16, float32 or float64. One Triton launch on CUDA, nested absmax
    included; on a CPU bitsandbytes' own routine where it is loaded, else table lookups.

    Raises:
        ValueError: another dtype.
    """
    dtype = weight.dtype if dtype is None else dtype
    if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"dtype is {dtype}, must be float16, bfloat16, float32 or float64")
    tensors, layout = flatten(weight)
    return _dequantize_op(tensors, layout, dtype, _triton_reads(weight, dtype))


def _triton_reads(weight: NF4Weight, dtype: torch.dtype) -> bool:
    if not triton_serves(weight.packed.device, dtype):
        return False
    from .nf4_triton import obstacle

    reason = obstacle(weight)
    if reason is not None and forced_backend() == "triton":
        raise ValueError(f"nf4_dequantize can't take its Triton kernel: {reason}")
    return reason is None


def flatten(weight: NF4Weight) -> tuple[list[Tensor], list[int]]:
    """As tensors and integers, which is what the dispatcher can pass on."""
    nested = (weight.absmax_code, weight.absmax_scale, weight.absmax_offset)
    tensors = [weight.packed, weight.absmax, weight.code, *(part for part in nested if part is not None)]
    return tensors, [*weight.shape, weight.blocksize, weight.absmax_blocksize]


def unflatten(tensors: Sequence[Tensor], layout: Sequence[int], dtype: torch.dtype) -> NF4Weight:
    """The inverse of `flatten`; further tensors may follow."""
    packed, absmax, code, *rest = tensors
    rows, columns, blocksize, absmax_blocksize = layout
    shape = (rows, columns)
    if not absmax_blocksize:
        return NF4Weight(packed, absmax, code, blocksize, shape, dtype)
    decoding = (rest[0], rest[1], rest[2])
    return NF4Weight(packed, absmax, code, blocksize, shape, dtype, *decoding, absmax_blocksize)


@torch.library.custom_op("qtrain::nf4_dequantize", mutates_args=())
def _dequantize_op(tensors: list[Tensor], layout: list[int], dtype: torch.dtype, triton: bool) -> Tensor:
    return dequantize(unflatten(tensors, layout, dtype), dtype, triton)


@_dequantize_op.register_fake
def _(tensors: list[Tensor], layout: list[int], dtype: torch.dtype, _triton: bool) -> Tensor:
    return tensors[0].new_empty(layout[:2], dtype=dtype)


def dequantize(weight: NF4Weight, dtype: torch.dtype, triton: bool) -> Tensor:
    """Without the dispatcher, for use inside other ops."""
    if triton:
        from . import nf4_triton

        return nf4_triton.dequantize(weight, dtype)
    absmax = _absmax(weight)
    if _native(weight, dtype):
        op = torch.ops.bitsandbytes.dequantize_4bit.default  # half the time of table lookups
        return op(weight.packed.unsqueeze(1), absmax, weight.blocksize, "nf4", weight.shape, dtype)
    return _by_table(weight, absmax, dtype)


def _native(weight: NF4Weight, dtype: torch.dtype) -> bool:
    """Whether bitsandbytes is loaded and has C code for this.

    That code is wrong where blocks straddle rows (0.50.2), and large blocks go through torch.compile.
    """
    return (
        weight.packed.is_cpu
        and dtype != torch.float64
        and weight.blocksize < 2048
        and weight.shape[1] % weight.blocksize == 0
        and hasattr(torch.ops.bitsandbytes, "dequantize_4bit")
    )


def _absmax(weight: NF4Weight) -> Tensor:
    """[blocks] float32."""
    absmax, code, scale = weight.absmax.view(-1), weight.absmax_code, weight.absmax_scale
    if code is None or scale is None or weight.absmax_offset is None:
        return absmax
    values = code.index_select(0, absmax.to(torch.int32))
    scales = scale.view(-1).repeat_interleave(weight.absmax_blocksize)[: values.numel()]
    return values.mul_(scales).add_(weight.absmax_offset)


def _by_table(weight: NF4Weight, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """A byte selects a pair of values: one 64-bit gather for two weights, chunk by chunk."""
    pairs = torch.stack((weight.code.repeat_interleave(16), weight.code.repeat(16)), dim=1)  # [256, 2]
    table = pairs.view(torch.int64).view(-1)
    packed, size, block = weight.packed.view(-1), weight.shape[0] * weight.shape[1], weight.blocksize
    whole = size - size % block
    out = torch.empty(size, dtype=dtype, device=packed.device)
    step = max(CHUNK, block)  # both are powers of two: a chunk is whole blocks
    for first in range(0, size, step):
        last = min(first + step, whole)
        if first < last:
            pieces = table.index_select(0, packed[first // 2 : last // 2].to(torch.int32))
            values = pieces.view(torch.float32).view(-1, block)
            out[first:last].view(-1, block).copy_(
                values.mul_(absmax[first // block : last // block].unsqueeze(1))
            )
    if whole < size:
        tail = table.index_select(0, packed[whole // 2 :].to(torch.int32)).view(torch.float32)
        out[whole:] = tail * absmax[-1]
    return out.view(weight.shape)
