"""Which channel scales are chosen, and what a stage does with them."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qtrain.export.awq.nearest import least_error
from qtrain.export.awq.scales import Part, channel_scales
from qtrain.export.awq.stage import by_column, scaled
from qtrain.export.formats import gptq
from qtrain.export.formats.scheme import Scheme
from qtrain.export.layerwise import Step
from qtrain.export.quantize_stage import StageSettings
from qtrain.export.rounding.curvature import curvature
from qtrain.export.rounding.grid import nearest, search_grid
from qtrain.export.rounding.linear import round_linear
from tests.export.folders import ARCHITECTURES, files_of, save_model
from tests.export.test_layerwise import quantize, windows

pytestmark = pytest.mark.usefixtures("one_thread")


def problem(seed: int = 0, width: int = 64, rows: int = 96) -> tuple[Tensor, Tensor, Tensor]:
    """W with loud columns, x with loud channels of its own, and tokens [T, K]."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator)
    weight[:, ::7] *= 5
    loud = torch.rand(width, generator=generator).mul_(3).exp_()
    mixed = torch.randn(width, width, generator=generator) * 0.3 + torch.eye(width)
    return weight, loud, (torch.randn(1000, width, generator=generator) @ mixed) * loud


def closed_form(weight: Tensor, cost: Tensor, scales: Tensor, length: int, symmetric: bool) -> float:
    """The docstring's formula, written once more, in float64."""
    total = 0.0
    rows = (weight * scales).double()
    for first in range(0, weight.shape[1], length):
        group = rows[:, first : first + length]
        if symmetric:
            span = group.abs().amax(1)
        else:
            span = group.amax(1).clamp(min=0) - group.amin(1).clamp(max=0)
        part = slice(first, first + length)
        total += float(span.square().sum() * (cost[part] / scales[part].square()).double().sum())
    return total


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_are_at_a_minimum_of_the_closed_form(symmetric: bool) -> None:
    weight, _, x = problem()
    cost = x.square().sum(0)
    groups = torch.arange(64).div(32, rounding_mode="floor")
    found, *tried = channel_scales([Part(weight, groups, symmetric, 15)], cost, cost.sqrt())
    least = closed_form(weight, cost, found, 32, symmetric)
    assert least < min(closed_form(weight, cost, t, 32, symmetric) for t in tried) * 0.999
    assert torch.equal(tried[0], torch.ones(64))
    # 20 steps come within 2 % of where many more would lead: nothing near is lower by more
    generator = torch.Generator().manual_seed(1)
    for size in (0.01, 0.03, 0.1):
        for _ in range(20):
            near = found * torch.randn(64, generator=generator).mul_(size).exp_()
            assert closed_form(weight, cost, near, 32, symmetric) > least * 0.98


def test_groups_and_columns_of_zeros_get_finite_scales() -> None:
    weight, _, x = problem()
    weight[:, 32:] = 0
    x[:, :4] = 0
    found = curvature(x.t() @ x)
    squares, cost = by_column(found, found.gram.diagonal()), by_column(found, found.importance)
    groups = torch.arange(64).div(32, rounding_mode="floor")
    for scales in channel_scales([Part(weight, groups, False, 15)], cost, squares.sqrt()):
        assert bool(torch.isfinite(scales).all())
        assert float(scales.min()) > 0


def test_channels_that_share_a_scale_get_one() -> None:
    weight, _, x = problem()
    cost = x.square().sum(0)
    channels = torch.arange(64) % 32
    groups = torch.arange(64).div(32, rounding_mode="floor")
    found, *tried = channel_scales([Part(weight, groups, True, 15)], cost, cost.sqrt(), channels)
    assert found.shape == (32,)
    costs = [closed_form(weight, cost, t[channels], 32, True) for t in (found, *tried)]
    assert costs[0] == min(costs) < costs[1]


def test_scaled_curvature_is_that_of_scaled_inputs() -> None:
    _, _, x = problem()
    t = torch.rand(64, generator=torch.Generator().manual_seed(2)) + 0.5
    found = scaled(curvature(x.t() @ x, damp=0.01), t)
    places = found.columns
    damped = (x.t() @ x).double()
    damped.diagonal().add_(0.01 * damped.diagonal().mean())
    expected = (damped / t / t[:, None])[places][:, places]
    # sums of 1000 float32 products, and their factor: 1e-3 of the largest covers both
    bound = 1e-3 * float(expected.diagonal().max())
    torch.testing.assert_close(found.gram.double(), expected, rtol=1e-4, atol=bound)
    torch.testing.assert_close(
        found.factor.double().t() @ found.factor.double(), expected, rtol=1e-4, atol=bound
    )
    torch.testing.assert_close(by_column(found, found.columns), torch.arange(64), rtol=0, atol=0)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_scales_leave_less_error_than_none(rounding: Any) -> None:
    weight, _, x = problem()
    scheme = Scheme(4, 32, symmetric=False)
    gram = x.t() @ x
    found = curvature(gram.clone())
    squares = by_column(found, found.gram.diagonal())
    cost = squares if rounding == "nearest" else by_column(found, found.importance)
    groups = torch.arange(64).div(32, rounding_mode="floor")
    t = channel_scales([Part(weight, groups, False, 15)], cost, squares.sqrt())[0]

    def error(scales: Tensor) -> float:
        its = round_linear(
            weight * scales, scaled(curvature(gram.clone()), scales), scheme, rounding=rounding, refine=0
        )
        missed = (its.linear.dequantize() / scales - weight).double()
        return float(((missed @ gram.double()) * missed).sum())

    assert error(t) < 0.8 * error(torch.ones(64))


def test_least_error_is_measured_on_rounded_weights() -> None:
    weight, loud, x = problem()
    found = curvature(x.t() @ x, damp=1e-6)
    scheme = Scheme(4, 32)
    candidates = [torch.ones(64), loud.sqrt(), loud, 1 / loud]
    chosen = least_error(candidates, {"m": weight}, {"m": scheme}, found, (1.0,), torch.arange(64))

    def error(scales: Tensor) -> float:
        groups = torch.arange(64).div(32, rounding_mode="floor")
        wanted = (weight * scales).t()
        grid = search_grid(wanted, torch.ones(64), scheme, groups, ranges=(1.0,))
        q = nearest(wanted, grid.scales[groups], grid.zeros[groups], 15)
        missed = (grid.dequantize(q) / scales[:, None]).t() - weight
        return float((x @ missed.t()).square().sum())

    errors = [error(scales) for scales in candidates]
    assert torch.equal(chosen, candidates[errors.index(min(errors))])
    assert errors[0] > 1.1 * min(errors)  # or the choice would not matter


def logits(folder: Path, tensors: dict[str, Tensor], scheme: Scheme) -> Tensor:
    """Of the model with an export's tensors in it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, values in tensors.items():
            module, _, suffix = name.rpartition(".")
            if name in parameters:
                parameters[name].copy_(values)
            elif suffix == "qweight":
                parts = {
                    part: tensors[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")
                }
                parameters[f"{module}.weight"].copy_(gptq.unpack(parts, scheme).dequantize())
        return model(input_ids=windows()).logits


@pytest.mark.parametrize(
    ("architecture", "order"), [*((name, "static") for name in ARCHITECTURES), ("qwen3", "full")]
)
def test_an_export_with_8_bits_is_near_its_model(architecture: str, order: Any, tmp_path: Path) -> None:
    """A fold in the wrong place changes logits by as much as they are."""
    from transformers import AutoModelForCausalLM

    folder = save_model(tmp_path / "m", architecture)
    scheme = Scheme(8, 32, desc_act=order == "full")
    names = quantize_names(folder)
    steps: list[Step] = []
    journal = quantize(
        folder,
        tmp_path / "out",
        schemes=dict.fromkeys(names, scheme),
        settings=StageSettings(scaling="awq", act_order=order),
        progress=steps.append,
    )
    tensors = {k: v for entry in journal.names() for k, v in journal.load(entry).items()}
    assert {name.rpartition(".")[2] for name in tensors} == {
        *("qweight", "qzeros", "scales", "g_idx", "weight"),
        *(("bias",) if architecture == "qwen2" else ()),
    }
    assert not any(step.note for step in steps)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        expected = model(input_ids=windows()).logits
    missed = (logits(folder, tensors, scheme) - expected).square().mean() / expected.var()
    # 8 bits have 1 / 255 of a range as a step: 1e-5 of the squares for each of 14 modules
    assert float(missed) < 2e-3


def quantize_names(folder: Path) -> list[str]:
    from qtrain.export.structure import find_structure

    return list(find_structure(folder).linears())


@pytest.mark.parametrize("settings", [{}, {"rounding": "nearest"}, {"rounding": "nearest", "clip": True}])
def test_scales_lower_the_error_of_every_kind_of_rounding(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m")
    errors = {}
    for scaling in ("none", "awq"):
        steps: list[Step] = []
        quantize(
            folder,
            tmp_path / scaling,
            settings=StageSettings(scaling=scaling, **settings),  # type: ignore[arg-type]
            progress=steps.append,
        )
        errors[scaling] = [step.error or 0.0 for step in steps]
    logs = torch.tensor(errors["awq"]).log() - torch.tensor(errors["none"]).log()
    assert float(logs.mean()) < -0.01


def test_clipping_is_searched_only_where_asked(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m")
    plain, clipped = (
        sum(
            step.error or 0.0
            for step in steps_of(folder, tmp_path / str(clip), StageSettings(rounding="nearest", clip=clip))
        )
        for clip in (False, True)
    )
    assert clipped < 0.9 * plain


def steps_of(folder: Path, out: Path, settings: StageSettings, **more: Any) -> list[Step]:
    steps: list[Step] = []
    quantize(folder, out, settings=settings, progress=steps.append, **more)
    return steps


def test_stages_that_cannot_be_scaled_say_why(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m")
    left = {"model.layers.0.self_attn.v_proj": None, "model.layers.1.mlp.up_proj": None}
    steps = steps_of(folder, tmp_path / "out", StageSettings(scaling="awq"), schemes=left)
    notes = {step.module.removeprefix("model.layers."): step.note for step in steps if step.note}
    assert notes.keys() == {
        "0.self_attn.q_proj",
        "0.self_attn.o_proj",
        "1.mlp.gate_proj",
        "1.mlp.down_proj",
    }
    assert notes["0.self_attn.q_proj"] == (
        "not scaled: self_attn.v_proj reads the same inputs and stays in 16 bits"
    )
    assert notes["1.mlp.down_proj"] == "not scaled: mlp.up_proj stays in 16 bits"


KILLED = """
import os, signal, sys
from pathlib import Path
from qtrain.export.quantize_stage import StageSettings
from tests.export.test_layerwise import quantize

def die(step):
    if step.module.endswith(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

quantize(Path(sys.argv[1]), Path(sys.argv[2]), progress=die, settings=StageSettings(scaling="awq"))
"""


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", "qwen2", num_hidden_layers=3)
    command = [sys.executable, "-c", KILLED, str(folder), str(tmp_path / "killed"), "layers.1.mlp.down_proj"]
    died = subprocess.run(command, cwd=Path(__file__).parents[3], check=False, capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    settings = StageSettings(scaling="awq")
    resumed = quantize(folder, tmp_path / "killed", resume=True, settings=settings)
    whole = quantize(folder, tmp_path / "whole", settings=settings)
    found, expected = files_of(resumed.folder), files_of(whole.folder)
    for name in (f"layer-{index}.safetensors" for index in range(3)):
        assert found[name] == expected[name], name
