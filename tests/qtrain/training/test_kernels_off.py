"""The switch `kernels`: both settings train the same model, and the run says which one it took."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qtrain.model import lora_layers
from tests.qtrain.tiny import save_tiny_base

from .conftest import MakeRecipe, do_run, losses


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Widths of 64 and 128: bitsandbytes' own decode is wrong on a CPU where blocks straddle rows."""
    return save_tiny_base(tmp_path_factory.mktemp("wide"), hidden_size=64, intermediate_size=128)


@pytest.mark.parametrize(("method", "quantization"), [("sft", "nf4"), ("sft", "none"), ("dpo", "nf4")])
def test_twenty_steps_both_ways(
    make_recipe: MakeRecipe,
    wide_base: Path,
    method: str,
    quantization: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings: dict[str, Any] = {
        "model__name": wide_base,
        "model__quantization": quantization,
        "adapter__target_modules": "all-linear",
        "training__max_steps": 20,
        "training__learning_rate": 0.003,
    }
    ours, theirs = (make_recipe(name, method, kernels=name, **settings) for name in ("auto", "off"))
    _, text = do_run(ours)
    with monkeypatch.context() as patch:
        patch.setattr(lora_layers, "lora_linear_group", None)  # `off` must not so much as look at it
        _, off_text = do_run(theirs)
    assert "lora_linear: 14 layers pytorch" in text
    assert "one input for q_proj + k_proj + v_proj, gate_proj + up_proj" in text
    assert "lora_linear: 14 layers peft: kernels is off" in off_text
    # fp32 on both sides: gradients differ in their last bits, which Adam's first steps divide by their own
    # size; what comes of it stays far below what a step changes
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-3, abs=1e-5)
    assert losses(ours)[-1] < losses(ours)[0]
    mine, other = (
        load_file(recipe.out / "adapter" / "adapter_model.safetensors") for recipe in (ours, theirs)
    )
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        moved = 20 * 0.003  # at most, by Adam
        assert (tensor - other[name]).abs().max() < 0.02 * moved, name


def test_manifest_names_every_layer(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("run", training__max_steps=1)
    do_run(recipe)
    assert recipe.out is not None
    manifest = json.loads((recipe.out / "manifest.json").read_text())
    layers = manifest["kernels"]["lora_linear"]
    assert len(layers) == 4  # q_proj and v_proj of two decoder layers
    assert set(layers.values()) == {"pytorch: float32 base, cpu tensors; one input for q_proj + v_proj"}
    assert manifest["choices"]["linear_logprob"].startswith("pytorch: ")


def test_bf16_learns_as_well_as_peft(make_recipe: MakeRecipe, wide_base: Path) -> None:
    """peft multiplies A and B in fp32, lora_linear in bf16: as close as bf16 makes two runs."""
    found = []
    for name in ("auto", "off"):
        recipe = make_recipe(
            name,
            kernels=name,
            model__name=wide_base,
            model__quantization="nf4",
            model__compute_dtype="bf16",
            training__max_steps=20,
            adapter__dropout=0.05,
        )
        do_run(recipe)
        found.append(torch.tensor(losses(recipe)))
    assert found[0][-1] < 0.8 * found[0][0]
    # 2^-8 for the rounding of a logit, some of it systematic, and other dropout masks
    torch.testing.assert_close(found[0][:5], found[1][:5], rtol=0.05, atol=0)
