"""Tiny models, tokenizers and run directories for tests: everything is made here, nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEXTS = [
    "The total of the week is 120, the growth is 5 percent.",
    '[{"city": "Berlin", "sales": 12}, {"city": "Paris", "sales": 7}]',
    "| city | sales |\n| --- | --- |\n| Berlin | 12 |\nuser assistant system",
]


def tiny_tokenizer() -> Any:
    """Byte-level BPE with ChatML; pad == eos == <|im_end|>, as Qwen and SmolLM have it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|endoftext|>", "<|im_start|>"],
        chat_template=CHATML,
    )


def tiny_qwen2(vocab_size: int = 320, seed: int = 0, **changes: Any) -> Any:
    """A random Qwen2ForCausalLM in fp32: hidden 32, 2 layers, 4 heads, 2 of them for keys and values."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    settings = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,  # the default 0.02 makes every token about as likely as any other
    }
    model = Qwen2ForCausalLM(Qwen2Config(**(settings | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.eval()


def save_tiny_base(folder: Path, seed: int = 0, eos_scale: float = 1.0, **changes: Any) -> Path:
    """A base model folder with weights, tokenizer and generation config."""
    tokenizer = tiny_tokenizer()
    model = tiny_qwen2(len(tokenizer), seed, **changes)
    # longer than the other rows, so that the end of a turn is now and then the likeliest token
    model.get_input_embeddings().weight.data[tokenizer.eos_token_id] *= eos_scale
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_tiny_run(
    folder: Path,
    base: Path,
    *,
    seed: int = 0,
    method: str = "sft",
    scale: float = 0.3,
    quantization: str = "none",
    data: Mapping[str, Any] | None = None,
) -> Path:
    """A finished run directory whose adapter is random instead of trained (B is normal with std `scale`)."""
    import torch

    from qtrain.model.adapter import new_adapter
    from qtrain.model.load import load_base
    from qtrain.recipe.load import dump_recipe
    from qtrain.recipe.schema import Recipe
    from qtrain.runs.atomic import write_checksums
    from qtrain.runs.rundir import RunDir

    recipe = Recipe.model_validate(
        {
            "model": {"name": str(base), "quantization": quantization, "compute_dtype": "fp32"},
            "adapter": {"r": 4, "alpha": 8},
            "training": {"method": method},
            "data": {"max_length": 512, **(data or {})},
            "out": str(folder),
        }
    )
    loaded = load_base(recipe.model)
    torch.manual_seed(seed)
    model = new_adapter(loaded.model, recipe.adapter)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=scale)
    run = RunDir(folder)
    folder.mkdir(parents=True)
    model.save_pretrained(str(run.adapter))
    write_checksums(run.adapter)
    run.recipe.write_text(dump_recipe(recipe), encoding="utf-8")
    run.set_status("finished", step=3, final_loss=1.25)
    return folder


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """A jsonl file."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
