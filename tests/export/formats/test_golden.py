"""The formats' bytes, worked by hand: two rows of eight columns, too small for a mistake to hide in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtrain.export.errors import ExportError
from qtrain.export.formats import awq, compressed_tensors, gptq
from qtrain.export.formats.quantized import QuantizedLinear
from qtrain.export.formats.scheme import Scheme


def _words(*rows: list[int]) -> Tensor:
    """int32 from hexadecimal literals, which are unsigned."""
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32)


def _linear(zeros: Tensor | None, g_idx: Tensor | None = None) -> QuantizedLinear:
    """[8, 8]: q[n, k] = (n + k) mod 16, two groups of four columns."""
    n, k = torch.arange(8), torch.arange(8)
    q = ((n[:, None] + k[None, :]) % 16).to(torch.uint8)
    scales = torch.tensor([[1.0, 0.5]]).repeat(8, 1).to(torch.float16)
    return QuantizedLinear(q, scales, zeros, g_idx, bits=4, group_size=4)


ZEROS = torch.tensor([[1 + n, 15 - n] for n in range(8)], dtype=torch.uint8)  # [8, 2]


def test_gptq_packs_along_the_inputs_lowest_nibble_first() -> None:
    packed = gptq.pack(_linear(None), "m")
    # column n of qweight: q[n, 0..7] = n, n+1, ..., n+7 from the lowest nibble up
    words = [0x76543210, 0x87654321, 0x98765432, 0xA9876543, 0xBA987654, 0xCBA98765, 0xDCBA9876, 0xEDCBA987]
    assert torch.equal(packed["qweight"], _words(words))
    assert torch.equal(packed["qzeros"], _words([0x77777777], [0x77777777]))  # z - 1 = 7
    assert packed["g_idx"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert packed["g_idx"].dtype == torch.int32
    assert torch.equal(packed["scales"], torch.tensor([[1.0] * 8, [0.5] * 8]).half())
    assert set(packed) == {"qweight", "qzeros", "scales", "g_idx"}


def test_gptq_stores_zero_points_less_one_along_the_outputs() -> None:
    packed = gptq.pack(_linear(ZEROS), "m")
    # group 0: z = 1..8, stored 0..7; group 1: z = 15..8, stored 14..7
    assert torch.equal(packed["qzeros"], _words([0x76543210], [0x789ABCDE]))


def test_gptq_8_bits() -> None:
    q = torch.arange(16, dtype=torch.uint8).reshape(4, 4) + 240  # four rows, a word each
    linear = QuantizedLinear(q, torch.ones(4, 1).half(), None, None, bits=8, group_size=-1)
    packed = gptq.pack(linear, "m")
    assert torch.equal(packed["qweight"], _words([0xF3F2F1F0, 0xF7F6F5F4, 0xFBFAF9F8, 0xFFFEFDFC]))
    assert torch.equal(packed["qzeros"], _words([0x7F7F7F7F]))


def test_awq_packs_along_the_outputs_even_columns_first() -> None:
    packed = awq.pack(_linear(ZEROS), "m")
    # row k: outputs 0 2 4 6 1 3 5 7 from the lowest nibble up, of q = n + k
    words = [0x75316420, 0x86427531, 0x97538642, 0xA8649753, 0xB975A864, 0xCA86B975, 0xDB97CA86, 0xECA8DB97]
    assert torch.equal(packed["qweight"], _words(*[[word] for word in words]))
    # group 0: z = 1 3 5 7 | 2 4 6 8; group 1: 15 13 11 9 | 14 12 10 8; nothing subtracted
    assert torch.equal(packed["qzeros"], _words([0x86427531], [0x8ACE9BDF]))
    assert torch.equal(packed["scales"], torch.tensor([[1.0] * 8, [0.5] * 8]).half())
    assert set(packed) == {"qweight", "qzeros", "scales"}


def test_awq_stores_eight_for_symmetric_weights() -> None:
    packed = awq.pack(_linear(None), "m")
    assert torch.equal(packed["qzeros"], _words([0x88888888], [0x88888888]))


def test_compressed_tensors_keeps_rows_and_packs_zero_points_along_the_outputs() -> None:
    packed = compressed_tensors.pack(_linear(ZEROS), "m")
    words = [0x76543210, 0x87654321, 0x98765432, 0xA9876543, 0xBA987654, 0xCBA98765, 0xDCBA9876, 0xEDCBA987]
    assert torch.equal(packed["weight_packed"], _words(*[[word] for word in words]))
    assert torch.equal(packed["weight_zero_point"], _words([0x87654321, 0x89ABCDEF]))
    assert packed["weight_shape"].tolist() == [8, 8]
    assert packed["weight_shape"].dtype == torch.int64
    assert torch.equal(packed["weight_scale"], torch.tensor([[1.0, 0.5]] * 8).half())
    symmetric = compressed_tensors.pack(_linear(None), "m")
    assert set(symmetric) == {"weight_packed", "weight_scale", "weight_shape"}


def test_dequantize() -> None:
    weight = _linear(ZEROS).dequantize()
    n, k = torch.arange(8)[:, None], torch.arange(8)[None, :]
    expected = torch.where(k < 4, (n + k) - (1 + n), 0.5 * ((n + k) - (15 - n)))
    assert torch.equal(weight, expected.float())
    shuffled = torch.tensor([1, 0, 1, 0, 1, 0, 1, 0], dtype=torch.int32)
    symmetric = _linear(None, shuffled).dequantize()
    assert torch.equal(symmetric, torch.where(k % 2 == 0, 0.5, 1.0) * ((n + k) - 8).float())


def test_gptq_refuses_a_zero_point_of_zero() -> None:
    zeros = ZEROS.clone()
    zeros[3, 1] = 0
    with pytest.raises(ExportError, match=r"^layer.x: a zero point is 0, .* keep zero points in 1 .. 15$"):
        gptq.pack(_linear(zeros), "layer.x")


def test_values_out_of_range_are_refused() -> None:
    q, scales = torch.full((8, 8), 16, dtype=torch.uint8), torch.ones(8, 2).half()
    with pytest.raises(ValueError, match=r"q holds 16, must be 0 .. 15"):
        QuantizedLinear(q, scales, None, None, 4, 4)
    with pytest.raises(ValueError, match=r"scales hold inf"):
        QuantizedLinear(q - 1, scales * torch.inf, None, None, 4, 4)
    with pytest.raises(ValueError, match=r"scales is \(8, 2\)"):
        QuantizedLinear(q - 1, scales, None, None, 4, 8)
    with pytest.raises(ValueError, match=r"g_idx holds values outside of 0 .. 1"):
        QuantizedLinear(q - 1, scales, None, torch.full((8,), 2, dtype=torch.int32), 4, 4)


def test_gptq_config() -> None:
    scheme = Scheme(4, 64)
    overrides = {f"l.0.mlp.{part}_proj": Scheme(8, 64) for part in ("gate", "up", "down")}
    found = gptq.config(scheme, overrides=overrides, skipped=["l.1.mlp.down_proj"])
    asked = {"bits": 4, "group_size": 64, "sym": True, "desc_act": False, "quant_method": "gptq"}
    assert found.items() >= (asked | {"checkpoint_format": "gptq", "lm_head": False}).items()
    patterns = [f"+:^l\\.0\\.mlp\\.{name}_proj$" for name in ("gate", "up", "down", "gate_up")]
    assert found["dynamic"] == {r"-:^l\.1\.mlp\.down_proj$": {}} | {name: {"bits": 8} for name in patterns}
    assert "dynamic" not in gptq.config(scheme, overrides={"m": scheme})


def test_awq_config() -> None:
    found = awq.config(Scheme(4, 64, symmetric=False), skipped=["lm_head"])
    assert found == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 64,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }
    with pytest.raises(ExportError, match="holds 4 bits, not 8"):
        awq.config(Scheme(8, 64))
    with pytest.raises(ExportError, match="no g_idx"):
        awq.config(Scheme(4, 64, desc_act=True))


def test_compressed_tensors_config() -> None:
    found = compressed_tensors.config(
        Scheme(4, 64), overrides={"m.down_proj": Scheme(8, -1)}, skipped=["lm_head"]
    )
    assert (found["quant_method"], found["format"], found["ignore"]) == (
        "compressed-tensors", "pack-quantized", ["lm_head"],
    )  # fmt: skip
    usual, other = found["config_groups"]["group_0"], found["config_groups"]["group_1"]
    assert usual["targets"] == ["Linear"]
    assert usual["weights"] == {
        "num_bits": 4, "type": "int", "symmetric": True, "dynamic": False,
        "strategy": "group", "group_size": 64,
    }  # fmt: skip
    assert other["targets"] == ["m.down_proj"]
    assert (other["weights"]["strategy"], other["weights"]["group_size"]) == ("channel", None)
