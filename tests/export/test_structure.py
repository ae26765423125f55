"""Stages, norms and links of decoder layers, found by running them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from qtrain.export.errors import ExportError
from qtrain.export.structure import Link, Stage, find_structure, layer_calls
from tests.export.folders import ARCHITECTURES, save_model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stages_norms_and_links(architecture: str, tmp_path: Path) -> None:
    structure = find_structure(save_model(tmp_path / "m", architecture))
    assert (structure.layers, structure.count) == ("model.layers", 2)
    assert structure.stages == (
        Stage(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm", "self_attn"),
        # gives 2: and the weights of attention, None
        Stage(("self_attn.o_proj",), None, "self_attn", gives=2, residual="input_layernorm"),
        Stage(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm", "mlp"),
        Stage(("mlp.down_proj",), None, "mlp", gives=1, residual="post_attention_layernorm"),
    )
    assert structure.links == (
        Link("self_attn.v_proj", "self_attn.o_proj", 16, 2),
        Link("mlp.up_proj", "mlp.down_proj", 96, 1),
    )
    assert len(structure.linears()) == 14
    assert structure.linears()["model.layers.1.mlp.down_proj"].in_features == 96


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = find_structure(save_model(tmp_path / "m")).model
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(not module._forward_hooks for module in model.modules())


def test_calls_hold_the_masks_of_sliding_layers(tmp_path: Path) -> None:
    folder = save_model(
        tmp_path / "m",
        "qwen2",
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=1,
        layer_types=["full_attention", "sliding_attention"],
    )
    structure = find_structure(folder)
    full, sliding = layer_calls(structure.model, structure.layers, torch.zeros(1, 32, 64))
    assert full["attention_mask"] is None  # plain causal attention needs none
    allowed = sliding["attention_mask"][0, 0]
    assert allowed.sum(1).tolist() == [min(row + 1, 8) for row in range(32)]


def test_a_norm_that_adds_one_to_its_weight_is_not_folded_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Gemma's does: y = norm(x) (1 + weight)."""
    from transformers.models.qwen2 import modeling_qwen2

    class OnePlusNorm(nn.Module):
        def __init__(self, width: int, eps: float) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(width))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)

    folder = save_model(tmp_path / "m")
    monkeypatch.setattr(modeling_qwen2, "Qwen2RMSNorm", OnePlusNorm)
    assert [stage.norm for stage in find_structure(folder).stages] == [None] * 4


def test_a_child_that_changes_its_last_linears_output_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.qwen2 import modeling_qwen2

    class HalvedMLP(modeling_qwen2.Qwen2MLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) / 2

    folder = save_model(tmp_path / "m")
    monkeypatch.setattr(modeling_qwen2, "Qwen2MLP", HalvedMLP)
    with pytest.raises(ExportError, match=r"model\.layers\.0\.mlp gives out is not its last linear"):
        find_structure(folder)


def test_layers_without_linear_modules_are_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2))
    model.save_pretrained(tmp_path / "gpt2")  # its projections are Conv1D
    with pytest.raises(ExportError, match="Qwen2, Qwen3, Llama and Mistral"):
        find_structure(tmp_path / "gpt2")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("Mixtral", {"num_local_experts": 2}, "belongs to a MixtralTopKRouter, which can't be quantised"),
        ("Gemma2", {"head_dim": 16}, "Gemma2ForCausalLM changes the embedding before its first layer"),
        ("GPTNeoX", {}, "GPTNeoXForCausalLM has no model.embed_tokens.weight"),
    ],
)
def test_other_architectures_are_refused(
    name: str, settings: dict[str, int], message: str, tmp_path: Path
) -> None:
    import transformers

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1}
    config = getattr(transformers, f"{name}Config")(**sizes, **heads, **settings)
    config.save_pretrained(tmp_path)
    with pytest.raises(ExportError, match="Qwen2, Qwen3, Llama and Mistral") as caught:
        find_structure(tmp_path)
    assert message in str(caught.value)
