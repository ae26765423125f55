"""Reading PEFT adapters: the same deltas as PEFT's, and none that are more than W + scaling B A."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtrain.export.checkpoint import Checkpoint
from qtrain.export.errors import ExportError
from qtrain.export.lora import Adapter
from tests.export.folders import save_adapter, save_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base") / "m", dtype=torch.float32)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
        {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"layers.0.*.q_proj": 5}, "use_rslora": True},
    ],
)
def test_deltas_are_pefts(base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = save_adapter(tmp_path, base, **settings)
    adapter = Adapter.open(folder)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder)).double()
    modules = dict(model.base_model.model.named_modules())
    adapted = {name for name, module in modules.items() if hasattr(module, "lora_A")}
    assert set(adapter.shapes) == adapted
    for name in adapted:
        delta = adapter.delta(name)
        expected = modules[name].get_delta_weight("default")  # float64
        torch.testing.assert_close(
            delta.rows(0, len(delta.b)), expected, rtol=1e-14, atol=1e-15
        )  # sums' order
        assert torch.equal(delta.in_float64().rows(3, 7), delta.rows(0, len(delta.b))[3:7]) or torch.allclose(
            delta.rows(3, 7), delta.rows(0, len(delta.b))[3:7], rtol=1e-14
        )


def _changed(folder: Path, **changes: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is IA3, only LORA can be merged here"),
        ({"use_dora": True}, "use_dora is set, which is more than W + scaling B A"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is set"),
        ({"bias": "all"}, "bias is all"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is pissa, which starts from other base weights"),
    ],
)
def test_other_arithmetic_is_refused(
    base: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ExportError, match=message.replace("+", r"\+")):
        Adapter.open(_changed(save_adapter(tmp_path, base), **changes))


def test_missing_and_damaged_adapters(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"holds no adapter_config.json; give a finished run"):
        Adapter.open(tmp_path)
    folder = save_adapter(tmp_path / "a", base)
    weights = folder / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(ExportError, match=r"adapter_model.safetensors is damaged"):
        Adapter.open(folder)
    weights.unlink()
    with pytest.raises(ExportError, match=r"adapter_model.safetensors is missing"):
        Adapter.open(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ExportError, match=r"adapter_config.json can't be read"):
        Adapter.open(folder)


def test_weights_that_are_no_plain_lora(base: Path, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path, base)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    save_file(tensors | {name: torch.ones(64)}, path)
    with pytest.raises(ExportError, match=r"lora_magnitude_vector is no plain LoRA weight"):
        Adapter.open(folder)
    tensors.pop("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight")
    save_file(tensors, path)
    with pytest.raises(ExportError, match=r"A and B of model.layers.0.self_attn.q_proj do not go together"):
        Adapter.open(folder)
    save_file({}, path)
    with pytest.raises(ExportError, match="holds no LoRA weights"):
        Adapter.open(folder)


def test_nan_is_named(base: Path, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path, base)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"][0, 0] = torch.nan
    save_file(tensors, path)
    adapter = Adapter.open(folder)
    adapter.delta("model.layers.0.mlp.down_proj")
    with pytest.raises(ExportError, match=r"model.layers.1.mlp.down_proj.lora_B holds 1 NaN"):
        adapter.delta("model.layers.1.mlp.down_proj")


def test_adapters_of_another_base(base: Path, tmp_path: Path) -> None:
    adapter = Adapter.open(save_adapter(tmp_path / "a", base))
    adapter.check_fits(Checkpoint.open(base).specs, base)
    wider = save_model(tmp_path / "wider", intermediate_size=128)
    with pytest.raises(
        ExportError,
        match=r"is for another base: model.layers.0.mlp.down_proj is 64 x 96 there and 64 x 128 in .*wider",
    ):
        adapter.check_fits(Checkpoint.open(wider).specs, wider)
    shallow = save_model(tmp_path / "shallow", num_hidden_layers=1)
    with pytest.raises(
        ExportError, match=r"shallow has no model.layers.1.\S+; give the base that it was trained on"
    ):
        adapter.check_fits(Checkpoint.open(shallow).specs, shallow)
