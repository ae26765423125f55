"""Channel scales folded: the model computes the same, and what is stored is what was chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qtrain.export.awq.fold import channels_of, fold_rows, fold_vector, foldable_rows
from qtrain.export.awq.stage import fold_scales, why_not
from qtrain.export.formats.quantized import QuantizedLinear
from qtrain.export.formats.scheme import Scheme
from qtrain.export.rounding.curvature import curvature
from qtrain.export.rounding.linear import Rounded
from qtrain.export.structure import Link, find_structure, linear
from tests.export.folders import ARCHITECTURES, save_model
from tests.export.test_layerwise import windows

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_folded_vector_is_exact_in_both_16_bit_dtypes() -> None:
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(4096, generator=generator) * 3).to(torch.bfloat16).float()
    values[:3] = torch.tensor([0.0, 2.0**-24, 64512.0])
    wanted = torch.rand(4096, generator=generator) * 8 + 0.05
    wanted[2] = 0.01  # 6.5 million: beyond float16
    folded, scales = fold_vector(values, wanted)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(folded.to(dtype).float(), folded)
    # float32's quotient of two values is half a unit in its last place off
    assert ((folded.double() * scales.double() - values.double()).abs() <= values.abs() * 2.0**-24).all()
    assert scales[0] == wanted[0]  # zero divided by anything
    assert (folded[1], scales[1]) == (values[1], 1)
    assert (folded[2], scales[2]) == (values[2], 1)
    assert ((scales[3:] / wanted[3:] - 1).abs() <= 2.0**-7).all()
    assert (folded[3:] != values[3:]).float().mean() > 0.9


def test_rows_take_scales_without_losing_digits() -> None:
    q = torch.randint(0, 16, (4, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scales = torch.tensor([[0.02, -0.03], [60000.0, 3.0], [2.0**-14, 0.5], [2.0**-20, 1.0]]).half()
    before = QuantizedLinear(q, scales, None, None, 4, 32)
    rows = foldable_rows(before, torch.tensor([3.0, 0.1, 5.0, 4.0]))
    # 60000 / 0.1 and 2^-14 / 5 are beyond float16 or lose digits there
    assert rows.tolist() == [3.0, pytest.approx(60000 / 65504, rel=1e-3), 1.0, 1.0]
    after = fold_rows(before, rows)
    assert torch.equal(after.q, q)
    torch.testing.assert_close(
        after.dequantize() * rows[:, None], before.dequantize(), rtol=2.0**-11, atol=0
    )  # float16's half unit, twice: values and quotient


def test_channels_of_repeated_heads() -> None:
    link = Link("v", "o", head_dim=2, repeats=2)
    assert channels_of(link, 8, torch.device("cpu")).tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    assert channels_of(Link("up", "down", 5, 1), 5, torch.device("cpu")).tolist() == [0, 1, 2, 3, 4]


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_folded_model_is_the_same_function(architecture: str, tmp_path: Path) -> None:
    """Every stage of every layer, with weights that are not rounded; in float64."""
    from transformers import AutoModelForCausalLM

    folder = save_model(tmp_path / "m", architecture)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    expected = model(input_ids=windows()).logits
    structure = find_structure(folder)
    scheme = Scheme(4, 32)
    largest = 1.0
    for layer in model.model.layers:
        parameters = dict(layer.named_parameters())
        # not rounded: q and scales stand in for the weight, whose rows are divided as its scales are
        earlier: dict[str, Rounded] = {}
        for stage in structure.stages:
            schemes: dict[str, Scheme] = dict.fromkeys(stage.linears, scheme)
            assert why_not(stage, structure.links, schemes, earlier) is None
            width = linear(layer, stage.linears[0]).in_features
            x = torch.randn(200, width, generator=torch.Generator().manual_seed(1)) * torch.rand(width) * 4
            found = curvature(x.t() @ x)
            weights = {name: linear(layer, name).weight for name in stage.linears}
            folded = fold_scales(
                layer,
                stage,
                structure.links,
                weights,
                found,
                schemes,
                "gptq",
                (1.0,),
                earlier,
                lambda name, its=parameters: its[name].float(),
            )
            largest = max(largest, float(folded.scales.max() / folded.scales.min()))
            for name, values in folded.changed.items():
                parameters[name].copy_(values)
            for name, its in folded.rounded.items():
                ratio = earlier[name].linear.scales.double() / its.linear.scales.double()
                parameters[f"{name}.weight"].div_(ratio.mean(1, keepdim=True))
                # the rounding of a scale to float16 is not the folding's: take it out
                rows = _rows(folded.scales, structure, stage)
                parameters[f"{name}.weight"].mul_(ratio.mean(1, keepdim=True) / rows[:, None])
                assert ((ratio / rows[:, None] - 1).abs() < 2.0**-10).all()
            for name in stage.linears:
                parameters[f"{name}.weight"].mul_(folded.scales)
                ones = torch.ones(parameters[f"{name}.weight"].shape[0], width // 32).half()
                q = torch.zeros(ones.shape[0], width, dtype=torch.uint8)
                earlier[name] = Rounded(QuantizedLinear(q, ones, None, None, 4, 32), 0.0)
    assert largest > 2  # scales that are all one would pass as well
    found_logits = model(input_ids=windows()).logits
    # t is a float32 quotient: 2^-24 of each weight, through 8 stages
    torch.testing.assert_close(found_logits, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def _rows(scales: Tensor, structure: Any, stage: Any) -> Tensor:
    link = next(link for link in structure.links if link.after == stage.linears[0])
    channels = channels_of(link, scales.numel(), scales.device)
    rows = torch.empty(int(channels.max()) + 1, dtype=torch.float64)
    rows[channels] = scales.double()
    return rows
