"""NF4 weights: the decode is bitsandbytes' bit for bit, and what can't be read is refused by name."""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn import Params4bit
from hypothesis import given, settings
from hypothesis import strategies as st

from qtrain.kernels import NF4Weight, nf4, nf4_dequantize, reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def _quantised(
    rows: int, columns: int, *, nested: bool, blocksize: int = 64, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, Any]:
    generator = torch.Generator().manual_seed(rows * columns)
    dense = torch.randn(rows, columns, generator=generator, dtype=torch.float32).to(dtype)
    dense[0] *= 30  # blocks of very different absmax
    return bnb.quantize_4bit(dense, quant_type="nf4", blocksize=blocksize, compress_statistics=nested)


def _absmax(state: Any) -> torch.Tensor:
    if state.state2 is None:
        return state.absmax
    return bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 70),
    blocks=st.integers(1, 5),
    blocksize=st.sampled_from([64, 128, 256, 1024]),
    nested=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_equals_bitsandbytes_bit_for_bit(
    rows: int, blocks: int, blocksize: int, nested: bool, dtype: torch.dtype
) -> None:
    """By the native code and by tables."""
    packed, state = _quantised(rows, blocks * blocksize, nested=nested, blocksize=blocksize, dtype=dtype)
    weight = NF4Weight.from_quant_state(packed, state)
    theirs = bnb.dequantize_4bit(packed, state)
    assert theirs.dtype == dtype
    assert torch.equal(nf4_dequantize(weight), theirs)
    assert torch.equal(nf4._by_table(weight, nf4._absmax(weight), dtype), theirs)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 70),
    pairs=st.integers(1, 150),
    blocksize=st.sampled_from([64, 128, 256, 4096]),
    nested=st.booleans(),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
)
def test_blocks_may_straddle_rows(
    rows: int, pairs: int, blocksize: int, nested: bool, dtype: torch.dtype
) -> None:
    """K is any even number, the last block may be short. bitsandbytes' own CPU code is wrong there."""
    packed, state = _quantised(rows, 2 * pairs, nested=nested, blocksize=blocksize)
    expected = reference.nf4_dequantize(packed, _absmax(state), state.code, blocksize, (rows, 2 * pairs))
    assert torch.equal(nf4_dequantize(NF4Weight.from_quant_state(packed, state), dtype), expected.to(dtype))


@pytest.mark.parametrize("blocksize", [64, 4096])
@pytest.mark.parametrize("nested", [True, False])
def test_chunks(nested: bool, blocksize: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4, "CHUNK", 256)  # several, the last of them ragged
    packed, state = _quantised(137, 46, nested=nested, blocksize=blocksize)
    weight = NF4Weight.from_quant_state(packed, state)
    expected = reference.nf4_dequantize(packed, _absmax(state), state.code, blocksize, (137, 46))
    assert torch.equal(nf4_dequantize(weight, torch.float32), expected)


def test_is_a_view() -> None:
    parameter = Params4bit(torch.randn(16, 64), requires_grad=False, quant_type="nf4").to("cpu")
    weight = NF4Weight.from_params4bit(parameter)
    assert weight.packed.data_ptr() == parameter.data_ptr()
    assert weight.absmax.data_ptr() == parameter.quant_state.absmax.data_ptr()
    assert weight.nested == parameter.quant_state.nested
    assert (weight.shape, weight.dtype) == ((16, 64), torch.float32)


def test_reads_bytes_stored_as_another_dtype() -> None:
    """FSDP wants parameters of one dtype: bitsandbytes then stores the bytes as floats."""
    dense = torch.randn(8, 64)
    packed, state = bnb.quantize_4bit(dense, quant_type="nf4", quant_storage=torch.bfloat16)
    assert packed.dtype == torch.bfloat16
    weight = NF4Weight.from_quant_state(packed, state)
    assert torch.equal(nf4_dequantize(weight), bnb.dequantize_4bit(packed, state))


def test_refuses_by_name() -> None:
    packed, state = bnb.quantize_4bit(torch.randn(8, 64), quant_type="fp4")
    with pytest.raises(ValueError, match="quant_type is fp4"):
        NF4Weight.from_quant_state(packed, state)
    packed, state = _quantised(8, 64, nested=True)
    with pytest.raises(ValueError, match="transposed"):
        NF4Weight.from_quant_state(packed.t(), state)
    with pytest.raises(ValueError, match="no quant_state"):
        NF4Weight.from_params4bit(Params4bit(torch.randn(8, 64), quant_type="nf4"))
    repacked, repacked_state = bnb._convert_weight_packed_for_cpu(*_quantised(64, 128, nested=True))
    with pytest.raises(ValueError, match="avx512_bf16"):
        NF4Weight.from_quant_state(repacked, repacked_state)
    with pytest.raises(ValueError, match=r"shape is \(8, 7\)"):
        NF4Weight(packed, state.absmax, state.code, 64, (8, 7), torch.float32)
    with pytest.raises(ValueError, match=r"absmax is .* must be 8 contiguous elements of torch.float32"):
        NF4Weight(packed, state.absmax, state.code, 64, (8, 64), torch.float32)  # nested, but not said so
    with pytest.raises(ValueError, match="absmax_code is missing"):
        NF4Weight(packed, state.absmax, state.code, 64, (8, 64), torch.float32, absmax_blocksize=256)
    with pytest.raises(ValueError, match=r"dtype is torch\.int8"):
        nf4_dequantize(NF4Weight.from_quant_state(packed, state), torch.int8)


@pytest.mark.parametrize("nested", [True, False])
def test_is_a_registered_op(nested: bool) -> None:
    weight = NF4Weight.from_quant_state(*_quantised(16, 64, nested=nested))
    tensors, layout = nf4.flatten(weight)
    torch.library.opcheck(torch.ops.qtrain.nf4_dequantize.default, (tensors, layout, torch.bfloat16, False))
    compiled = torch.compile(lambda: nf4_dequantize(weight, torch.float32) * 2, fullgraph=True)
    assert torch.equal(compiled(), nf4_dequantize(weight, torch.float32) * 2)
