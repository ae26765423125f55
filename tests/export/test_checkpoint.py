"""Reading model folders, and folders that are not what they should be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtrain.export.checkpoint import Checkpoint
from qtrain.export.errors import ExportError
from tests.export.folders import ARCHITECTURES, one_file, save_model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tensor_of_every_shard(architecture: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", architecture)
    checkpoint = Checkpoint.open(folder)
    assert len(checkpoint.files) > 2
    expected = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    assert set(checkpoint.specs) == set(expected)
    loaded = checkpoint.load(expected)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in expected.values())
    assert checkpoint.tied == (architecture in ("qwen2", "qwen3"))


def test_loaded_tensors_outlive_their_file(tmp_path: Path) -> None:
    folder = one_file(tmp_path, {"w": torch.arange(4.0)})
    weight = Checkpoint.open(folder).tensor("w")
    (folder / "model.safetensors").write_bytes(b"")
    assert weight.tolist() == [0, 1, 2, 3]


def test_nan_weights_are_named(tmp_path: Path) -> None:
    folder = one_file(tmp_path, {"fine": torch.ones(3), "model.layers.0.w": torch.tensor([1.0, torch.nan])})
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.tensor("fine").sum() == 3
    with pytest.raises(ExportError, match=r"model.safetensors: model.layers.0.w holds 1 NaN"):
        checkpoint.load(["fine", "model.layers.0.w"])
    assert checkpoint.tensor("model.layers.0.w", check=False).isnan().any()


def test_a_quantised_folder_is_refused_unless_wanted(tmp_path: Path) -> None:
    folder = one_file(tmp_path, {"w": torch.ones(3)}, quantization_config={"quant_method": "awq"})
    with pytest.raises(ExportError, match=r"is quantised already \(awq\); give the 16-bit model"):
        Checkpoint.open(folder)
    assert Checkpoint.open(folder, quantized=True).files == ("model.safetensors",)


def test_an_index_that_lies(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.extra.weight"] = sorted(content["weight_map"].values())[0]
    index.write_text(json.dumps(content))
    with pytest.raises(ExportError, match=r"does not hold model.extra.weight, which .* says"):
        Checkpoint.open(folder)
    first = sorted(content["weight_map"].values())[0]
    (folder / first).unlink()
    with pytest.raises(ExportError, match=rf"{first} is missing"):
        Checkpoint.open(folder)
    index.write_text("{}")
    with pytest.raises(ExportError, match="has no weight_map"):
        Checkpoint.open(folder)


def test_other_kinds_of_folder(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"config.json is missing; a model folder has one"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ExportError, match=r"config.json can't be read"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ExportError, match=r"has neither model.safetensors nor .*; give a whole model folder"):
        Checkpoint.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ExportError, match=r"it has pytorch_model.bin; convert it to safetensors first"):
        Checkpoint.open(tmp_path)


def test_heads_and_embeddings(tmp_path: Path) -> None:
    embedding = torch.randn(5, 4)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    with pytest.raises(ExportError, match=r"has no lm_head.weight, and by config.json it is not tied"):
        Checkpoint.open(one_file(tmp_path / "a", {names[0]: embedding}, tie_word_embeddings=False))
    tied = Checkpoint.open(one_file(tmp_path / "b", {names[0]: embedding}, tie_word_embeddings=True))
    assert tied.tied
    assert tied.check_tied_head() is None
    both = dict.fromkeys(names, embedding)
    save = one_file(tmp_path / "c", {name: t.clone() for name, t in both.items()}, tie_word_embeddings=True)
    assert Checkpoint.open(save).check_tied_head() is None
    save_file({names[0]: embedding, names[1]: embedding + 1}, save / "model.safetensors", {"format": "pt"})
    assert "differs from the embedding" in str(Checkpoint.open(save).check_tied_head())


@pytest.mark.parametrize(("model_type", "ties"), [("llama", False), ("qwen2", False), ("gemma2", True)])
def test_a_config_that_leaves_the_tie_to_the_architectures_default(
    model_type: str, ties: bool, tmp_path: Path
) -> None:
    tensors = {name: torch.randn(5, 4) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    folder = one_file(tmp_path, tensors, model_type=model_type)
    assert Checkpoint.open(folder).ties_embeddings == ties
    assert (Checkpoint.open(folder).check_tied_head() is None) == (not ties)
