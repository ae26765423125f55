"""Base models whose folders are not whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qtrain.errors import UserError
from qtrain.model.load import load_base, load_tokenizer
from qtrain.recipe.schema import ModelSettings
from tests.export.folders import change_tensors
from tests.qtrain.tiny import save_tiny_base

UP = "model.layers.1.mlp.up_proj.weight"


def _settings(base: Path, quantization: str = "none") -> ModelSettings:
    return ModelSettings.model_validate({"name": str(base), "quantization": quantization})


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_random_weights_are_not_trained_on_in_place_of_missing_ones(
    quantization: str, tmp_path: Path
) -> None:
    base = change_tensors(save_tiny_base(tmp_path / "base"), lambda tensors: tensors.pop(UP))
    with pytest.raises(UserError, match=rf"base holds no {UP}; get the model again"):
        load_base(_settings(base, quantization))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_tensor_of_another_shape(quantization: str, tmp_path: Path) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UP] = tensors[UP][:64].clone()

    base = change_tensors(save_tiny_base(tmp_path / "base", intermediate_size=128), cut)
    with pytest.raises(UserError, match=rf"{UP} of .*base is 64 x \d+, and 128 x \d+ by config.json"):
        load_base(_settings(base, quantization))


def test_a_damaged_weight_file(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base")
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"a weight file of .*base is damaged .*; get the model again"):
        load_base(_settings(base))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"hidden_size": "wide"}, "'hidden_size': TypeError: Field 'hidden_size' expected int, got str"),
        ({"hidden_act": "foo"}, "KeyError 'foo'"),
    ],
)
def test_values_of_config_that_transformers_can_not_take(
    value: dict[str, str], said: str, tmp_path: Path
) -> None:
    base = save_tiny_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | value))
    with pytest.raises(UserError, match="can't be loaded: ") as refused:
        load_base(_settings(base))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_tokenizer_without_a_vocabulary(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base")
    assert load_tokenizer(str(base), _settings(base))("a").input_ids
    for path in base.glob("*token*"):
        path.unlink()
    with pytest.raises(UserError, match=r"base holds no tokenizer's vocabulary .*copy the tokenizer's files"):
        load_tokenizer(str(base), _settings(base))
