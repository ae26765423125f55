"""Whatever is packed comes back; what can't be packed is refused with the sizes that can."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtrain.export.errors import ExportError
from qtrain.export.formats import awq, compressed_tensors, gptq
from qtrain.export.formats.quantized import QuantizedLinear
from qtrain.export.formats.scheme import Scheme, check_shape, check_shapes, fitting_group_sizes


@st.composite
def linears(draw: st.DrawFn, bits: tuple[int, ...], orders: bool, lowest_zero: int) -> QuantizedLinear:
    """Random layers of up to [64, 128]; values drawn from a seed, shapes by hypothesis."""
    width = draw(st.sampled_from(bits))
    per = 32 // width
    n = per * draw(st.integers(1, 64 // per))
    group = draw(st.sampled_from([8, 32, 64, -1]))
    k = (per if group == -1 else max(group, per)) * draw(st.integers(1, 2))
    groups = 1 if group == -1 else k // group
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def integers(low: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, 2**width, shape, generator=generator, dtype=torch.uint8)

    scales = torch.randn(n, groups, generator=generator).half()
    zeros = integers(lowest_zero, n, groups) if draw(st.booleans()) else None
    g_idx = None
    if orders and groups > 1 and draw(st.booleans()):
        g_idx = (torch.randperm(k, generator=generator) // group).to(torch.int32)
        if torch.equal(g_idx, (torch.arange(k) // group).to(torch.int32)):
            g_idx = None
    return QuantizedLinear(integers(0, n, k), scales, zeros, g_idx, width, group)


def _same(a: QuantizedLinear, b: QuantizedLinear) -> None:
    for name in ("q", "scales", "zeros", "g_idx"):
        ours, theirs = getattr(a, name), getattr(b, name)
        assert (ours is None) == (theirs is None), name
        assert ours is None or (torch.equal(ours, theirs) and ours.dtype == theirs.dtype), name
    assert a.scheme == b.scheme


@settings(max_examples=60, deadline=None)
@given(linears((2, 4, 8), orders=True, lowest_zero=1))
def test_gptq(linear: QuantizedLinear) -> None:
    _same(gptq.unpack(gptq.pack(linear, "m"), linear.scheme), linear)


@settings(max_examples=60, deadline=None)
@given(linears((4,), orders=False, lowest_zero=0))
def test_awq(linear: QuantizedLinear) -> None:
    _same(awq.unpack(awq.pack(linear, "m"), linear.scheme), linear)


@settings(max_examples=60, deadline=None)
@given(linears((2, 4, 8), orders=False, lowest_zero=0))
def test_compressed_tensors(linear: QuantizedLinear) -> None:
    _same(compressed_tensors.unpack(compressed_tensors.pack(linear, "m"), linear.scheme), linear)


@settings(max_examples=60, deadline=None)
@given(linears((4,), orders=False, lowest_zero=1))
def test_all_formats_hold_the_same_weight(linear: QuantizedLinear) -> None:
    weight = linear.dequantize()
    formats: list[Any] = [gptq, awq, compressed_tensors]
    for format_ in formats:
        assert torch.equal(format_.unpack(format_.pack(linear, "m"), linear.scheme).dequantize(), weight)


def test_packed_tensors_are_contiguous_and_own_their_memory() -> None:
    """safetensors refuses views, and two names of one memory."""
    q = torch.randint(0, 16, (16, 32), dtype=torch.uint8)
    linear = QuantizedLinear(q, torch.ones(16, 2).half(), torch.ones(16, 2, dtype=torch.uint8), None, 4, 16)
    formats: list[Any] = [gptq, awq, compressed_tensors]
    for format_ in formats:
        for name, tensor in format_.pack(linear, "m").items():
            assert tensor.is_contiguous(), (format_.__name__, name)
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, (format_.__name__, name)


def test_the_error_names_module_in_features_and_sizes_that_divide() -> None:
    with pytest.raises(
        ExportError,
        match=r"^l\.3\.down_proj: group_size 128 does not divide its in_features 576; "
        r"sizes that do: 64, 32, -1 \(-1: the whole row\)$",
    ):
        check_shape("l.3.down_proj", 576, 576, Scheme(4, 128))
    shapes = {"a": (64, 256), "b": (64, 192), "c": (64, 96)}
    with pytest.raises(ExportError, match=r"^b: .* in_features 192 \(nor those of 1 others\); .*: 32, -1 "):
        check_shapes(shapes, Scheme(4, 128))
    check_shapes(shapes, Scheme(4, 32))
    check_shapes(shapes, Scheme(4, -1))


def test_sizes_that_do_not_fill_words_are_refused() -> None:
    with pytest.raises(
        ExportError, match=r"^m: out_features 12 is no multiple of 8, which 4-bit packing needs"
    ):
        check_shape("m", 12, 64, Scheme(4, 64))
    with pytest.raises(ExportError, match=r"^m: in_features 36 is no multiple of 8"):
        check_shape("m", 16, 36, Scheme(4, -1))
    check_shape("m", 12, 36, Scheme(8, -1))


@given(st.lists(st.integers(1, 2**16), min_size=1, max_size=5))
def test_proposed_group_sizes_divide(in_features: list[int]) -> None:
    proposed = fitting_group_sizes(in_features)
    assert proposed[-1] == -1
    for group in (128, 64, 32):
        assert (group in proposed) == all(size % group == 0 for size in in_features)


@pytest.mark.parametrize(("bits", "group_size"), [(3, 64), (4, 0), (4, -2), (16, 64)])
def test_schemes_that_no_format_has(bits: int, group_size: int) -> None:
    with pytest.raises(ExportError, match=r"(bits|group_size) is -?\d+, must be"):
        Scheme(bits, group_size)
