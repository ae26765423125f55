"""Model folders whose weight files and config.json do not speak of the same model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qtrain.export.checkpoint import Checkpoint
from qtrain.export.completeness import check_complete, check_numbers
from qtrain.export.errors import ExportError
from qtrain.export.nf4_base import empty_model
from tests.export.folders import ARCHITECTURES, change_tensors, save_model

Change = Callable[[dict[str, torch.Tensor]], object]
UP = "model.layers.1.mlp.up_proj.weight"


def _checked(folder: Path, *, renamed: bool = False) -> str | None:
    return check_complete(Checkpoint.open(folder), empty_model(folder), renamed=renamed)


def _changed(folder: Path, change: Change, architecture: str = "qwen2") -> Path:
    """A model folder of one file whose tensors `change` has changed."""
    return change_tensors(save_model(folder, architecture, shard="1GB"), change)


@pytest.mark.parametrize("renamed", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_whole_folders_pass_and_each_missing_tensor_is_named(
    architecture: str, renamed: bool, tmp_path: Path
) -> None:
    assert _checked(save_model(tmp_path / "whole", architecture), renamed=renamed) is None
    names = sorted(load_file(_changed(tmp_path / "m", lambda _: None, architecture) / "model.safetensors"))
    for name in names:
        if name == "lm_head.weight":
            continue  # refused by Checkpoint.open already
        folder = _changed(tmp_path / name, lambda tensors, name=name: tensors.pop(name), architecture)
        with pytest.raises(ExportError, match=f"holds no {name}, which the model of its config.json has"):
            _checked(folder, renamed=renamed)


def test_a_stored_head_beside_a_tied_embedding_is_nothing_to_speak_of(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    assert _checked(_changed(tmp_path / "m", change)) is None


def test_more_than_one_missing_are_counted(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".layers.1." in name]:
            del tensors[name]

    with pytest.raises(ExportError, match=r"holds no model.layers.1.\S+ \(and 11 more\), which"):
        _checked(_changed(tmp_path / "m", change))


@pytest.mark.parametrize("renamed", [False, True])
def test_another_shape(renamed: bool, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UP] = tensors[UP][:90].clone()

    folder = _changed(tmp_path / "m", change)
    line = rf"model.safetensors: {UP} is 90 x 64, and 96 x 64 by config.json; get the model again"
    with pytest.raises(ExportError, match=line):
        _checked(folder, renamed=renamed)


def test_a_layer_more_than_config_has(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": 1, "layer_types": config["layer_types"][:1]}
    (folder / "config.json").write_text(json.dumps(config))
    note = _checked(folder)
    assert note is not None
    assert "model.layers.1." in note
    assert note.endswith("(and 11 more), which the model of its config.json has not; carried along as stored")


def test_names_that_transformers_converts_leave_open_what_is_missing(tmp_path: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "up_proj" in name]:
            tensors[name.replace("up_proj", "w3")] = tensors.pop(name)

    folder = _changed(tmp_path / "m", rename)
    note = _checked(folder, renamed=True)
    assert note is not None
    assert "model.layers.0.mlp.up_proj.weight (and 1 more) is missing" in note
    assert "is model.layers.0.mlp.w3.weight (and 1 more), is not known" in note
    with pytest.raises(ExportError, match=r"holds no model.layers.0.mlp.up_proj.weight \(and 1 more\)"):
        _checked(folder)


def test_numbers_are_looked_at_in_every_tensor(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m")
    check_numbers(Checkpoint.open(folder))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][5] = -torch.inf

    damaged = Checkpoint.open(_changed(tmp_path / "damaged", change))
    with pytest.raises(ExportError, match=r"model.norm.weight holds 0 NaN and 1 infinite values of 64"):
        check_numbers(damaged)
