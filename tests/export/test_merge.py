"""Merging: every weight is the correctly rounded sum, and everything else stays as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtrain.export.checkpoint import Checkpoint
from qtrain.export.errors import ExportError
from qtrain.export.lora import Adapter
from qtrain.export.merge import check_tied, merged_bytes, merged_config, parse_dtype, write_merged
from qtrain.export.merged_weights import MergedWeights
from qtrain.export.nf4_base import NF4Settings, nf4_modules
from qtrain.export.rounded import round_once
from qtrain.export.writer import CheckpointWriter
from tests.export.folders import ARCHITECTURES, save_adapter, save_model

WINDOW = torch.arange(3, 43).unsqueeze(0)  # [1, 40]


def _merge(
    folder: Path, adapter: Path | None, out: Path, *, shard: int = 10**9, **options: Any
) -> MergedWeights:
    weights = MergedWeights(
        Checkpoint.open(folder), None if adapter is None else Adapter.open(adapter), **options
    )
    with CheckpointWriter(out, max_shard_bytes=shard) as writer:
        write_merged(writer, weights)
        writer.copy_side_files(folder)
        writer.seal(merged_config(weights))
        writer.publish()
    return weights


def _tensors(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint.open(folder)
    return checkpoint.load(checkpoint.specs)


def _expected(base: Path, adapter: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """W + (alpha / r) B A in float64, from the files alone."""
    tensors = _tensors(base)
    config = json.loads((adapter / "adapter_config.json").read_text())
    parts = load_file(adapter / "adapter_model.safetensors")
    for name, a in parts.items():
        if "lora_A" in name:
            b = parts[name.replace("lora_A", "lora_B")]
            weight = name.removeprefix("base_model.model.").replace("lora_A.", "")
            delta = config["lora_alpha"] / config["r"] * (b.double() @ a.double())
            tensors[weight] = round_once(tensors[weight].double() + delta, dtype)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def _logits(folder: Path, adapter: Path | None = None, *, peft_merge: bool = False) -> Tensor:
    """float64 logits of the weights as stored."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
        model = model.merge_and_unload() if peft_merge else model
    with torch.inference_mode():
        return model.double().eval()(WINDOW).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merged_is_adapter_on_within_the_stored_dtypes_rounding(
    architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = save_model(tmp_path / "base", architecture, dtype=dtype)
    adapter = save_adapter(tmp_path / "adapter", base)
    _merge(base, adapter, tmp_path / "merged")
    expected, found = _expected(base, adapter, dtype), _tensors(tmp_path / "merged")
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        # summed in other blocks: float64 noise may fall on either side of a tie, once in 10^8 weights
        assert torch.equal(found[name], tensor), name
    on, merged = _logits(base, adapter), _logits(tmp_path / "merged")
    ours = float((merged - on).abs().max())
    theirs = float((_logits(base, adapter, peft_merge=True) - on).abs().max())
    unit = 2**-24 if dtype == torch.float32 else 2**-9  # relative rounding of a weight
    # four weights a layer, two layers, each value off by `unit` of itself at most: some tens of units
    assert ours < 40 * unit * float(on.abs().max())
    assert ours < 1.5 * theirs  # peft sums in float32: its error is of the same size, or the same
    assert float((_logits(base) - on).abs().max()) > 30 * ours  # the adapter does something


def test_what_the_adapter_does_not_touch_is_copied(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", shard="20KB")
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    weights = _merge(base, adapter, tmp_path / "merged")
    source, merged = Checkpoint.open(base), Checkpoint.open(tmp_path / "merged")
    same = [file for file in source.files if source.sha256(file) == merged.sha256(file)]
    touched = {source.file_of[f"{module}.weight"] for module in Adapter.open(adapter).shapes}
    assert set(source.files) - set(same) == touched
    assert len(same) > 3
    assert source.file_of == merged.file_of
    changed = {f"{module}.weight" for module in Adapter.open(adapter).shapes}
    ours, theirs = _tensors(tmp_path / "merged"), _tensors(base)
    assert {name for name in theirs if not torch.equal(ours[name], theirs[name])} == changed
    assert {name for name in source.specs if weights.changes(name)} == changed
    for name in ("config.json", "generation_config.json", "model.safetensors.index.json"):
        assert json.loads((base / name).read_text()) | {"metadata": 0} == json.loads(
            (tmp_path / "merged" / name).read_text()
        ) | {"metadata": 0}
    assert (base / "config.json").read_bytes() == (tmp_path / "merged" / "config.json").read_bytes()


def test_smaller_shards_and_another_dtype(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", shard="1GB")
    adapter = save_adapter(tmp_path / "adapter", base)
    weights = _merge(base, adapter, tmp_path / "merged", shard=30_000, dtype=torch.float32)
    merged = Checkpoint.open(tmp_path / "merged")
    assert len(merged.files) > 5
    big = {name for name, spec in merged.specs.items() if spec.nbytes > 30_000}
    for file in merged.files:
        names = merged.names_in(file)
        assert sum(merged.specs[name].nbytes for name in names) <= 30_000 or set(names) <= big
    assert merged_bytes(weights) == merged.nbytes
    assert merged.config["dtype"] == "float32"
    ours = merged.load(merged.specs)
    assert all(
        torch.equal(ours[name], tensor) for name, tensor in _expected(base, adapter, torch.float32).items()
    )


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied(tied: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = save_model(tmp_path / "base", tie_word_embeddings=tied)
    adapter = save_adapter(tmp_path / "adapter", base)
    weights = _merge(base, adapter, tmp_path / "merged")
    assert ("lm_head.weight" in Checkpoint.open(tmp_path / "merged").specs) == (not tied)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) == tied
    assert check_tied(weights)["tie_word_embeddings"] == tied


def test_an_adapter_on_a_tied_head_is_refused(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    path = adapter / "adapter_model.safetensors"
    parts = {"A": torch.randn(4, 64), "B": torch.randn(320, 4)}
    save_file(
        load_file(path)
        | {
            f"base_model.model.model.embed_tokens.lora_{part}.weight": tensor
            for part, tensor in parts.items()
        },
        path,
    )
    weights = MergedWeights(Checkpoint.open(base), Adapter.open(adapter))
    with pytest.raises(
        ExportError, match=r"changes model.embed_tokens.weight, and config.json ties the head"
    ):
        check_tied(weights)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_the_dequantised_base_has_bitsandbytes_bits(
    double_quant: bool, compute: torch.dtype, tmp_path: Path
) -> None:
    """Against a model that transformers loaded in 4 bits, module by module."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    base = save_model(tmp_path / "base", hidden_size=128, intermediate_size=192)
    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute,
    )
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantized, dtype=compute)
    settings = NF4Settings(double_quant, compute)
    weights = MergedWeights(Checkpoint.open(base), None, base="dequantized", nf4=settings, dtype=compute)
    held = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert sorted(held) == sorted(nf4_modules(base))
    assert len(held) == 14
    for name, module in held.items():
        expected = dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert torch.equal(weights.weight(f"{name}.weight"), expected), name
    for name in weights.specs:
        if name.rpartition(".")[0] not in held:
            assert torch.equal(weights.weight(name), Checkpoint.open(base).tensor(name).to(compute)), name


def test_merged_onto_the_dequantised_base(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    settings = NF4Settings(True, torch.float32)
    weights = _merge(base, adapter, tmp_path / "merged", base="dequantized", nf4=settings)
    plain = MergedWeights(Checkpoint.open(base), None, base="dequantized", nf4=settings, dtype=torch.float32)
    delta = Adapter.open(adapter).delta("model.layers.0.self_attn.q_proj")
    name = "model.layers.0.self_attn.q_proj.weight"
    exact = plain.weight(name).double() + delta.rows(0, 64)
    assert torch.equal(_tensors(tmp_path / "merged")[name], round_once(exact, torch.bfloat16))
    unadapted = "model.layers.0.self_attn.k_proj.weight"
    assert torch.equal(_tensors(tmp_path / "merged")[unadapted], plain.weight(unadapted).bfloat16())
    assert torch.equal(weights.load([name])[name], weights.tensor(name))


def test_values_beyond_fp16_are_named(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", shard="1GB")
    path = base / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][5, 5] = 1e5
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(
        ExportError, match=r"model.layers.1.mlp.up_proj.weight: merged values are beyond float16; use"
    ):
        _merge(base, None, tmp_path / "merged", dtype=torch.float16)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("module", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.gate_proj"])
def test_nan_in_the_base_is_named_in_touched_and_copied_shards(module: str, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", shard="20KB")
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    path = base / Checkpoint.open(base).file_of[f"{module}.weight"]
    tensors = load_file(path)
    tensors[f"{module}.weight"][1, 2] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ExportError, match=rf"{path.name}: {module}.weight holds 1 NaN"):
        _merge(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_unknown_architecture_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mystery9"}')
    with pytest.raises(ExportError, match=r"transformers can't build this architecture .*mystery9.*; Qwen2"):
        nf4_modules(tmp_path)


def test_dtypes() -> None:
    assert [parse_dtype(name) for name in ("bf16", "fp16", "fp32", "stored")] == [
        torch.bfloat16, torch.float16, torch.float32, None,
    ]  # fmt: skip
    with pytest.raises(ExportError, match="--dtype is int8, must be one of bf16, fp16, fp32, stored"):
        parse_dtype("int8")
