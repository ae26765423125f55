"""Model folders for tests of the export: tiny, random, of every supported architecture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ARCHITECTURES = ("qwen2", "qwen3", "llama", "mistral")


def tiny_model(architecture: str, seed: int = 0, **changes: Any) -> Any:
    """A random causal LM in fp32: hidden 64, 2 layers, 4 heads, 2 of them for keys and values, vocab 320."""
    import transformers

    names = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama", "mistral": "Mistral"}
    config_class = getattr(transformers, f"{names[architecture]}Config")
    model_class = getattr(transformers, f"{names[architecture]}ForCausalLM")
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": architecture in ("qwen2", "qwen3"),
        "initializer_range": 0.2,  # the default 0.02 makes every token about as likely as any other
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    if architecture == "qwen2":
        settings.pop("head_dim")
    model = model_class(config_class(**(settings | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.eval()


def save_model(
    folder: Path,
    architecture: str = "qwen2",
    *,
    dtype: torch.dtype = torch.bfloat16,
    shard: str = "60KB",
    **changes: Any,
) -> Path:
    """A model folder in several shards, without a tokenizer."""
    tiny_model(architecture, **changes).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def one_file(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """A folder with these tensors in one file and a config.json; nothing that transformers could load."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"} | config))
    return folder


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Rewrite a folder's only weight file with what `change` makes of its tensors; returns the folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    """Relative name -> content of every file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def save_adapter(folder: Path, base: Path, *, seed: int = 0, scale: float = 0.3, **settings: Any) -> Path:
    """A PEFT adapter for a model folder whose B is random instead of zero (normal, std `scale`)."""
    import peft
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**(config | settings))
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
        if "lora_B" in name:
            parameter.data.normal_(std=scale)
    model.save_pretrained(str(folder))
    return folder
