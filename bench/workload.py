"""The model and the rows that every variant of the training benchmark trains on.

A Qwen2 with random weights and a vocabulary of real size, where a step's time and memory go to the
output head as they do in a real small model. Made once from a seed, then shared by all variants.
Standard library only at import; making the model needs torch and transformers.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROWS = "rows.json"
EOS = 0  # the tokenizer's token i is the word `t<i>`, apart from this one
WORDS = 20_000  # rows draw their words from the first so many


@dataclass(frozen=True, slots=True)
class Workload:
    """Sizes and seed; the defaults are the documented comparison."""

    hidden_size: int = 512
    layers: int = 4
    intermediate_size: int = 1408
    heads: int = 8
    kv_heads: int = 2
    vocab_size: int = 151_936
    rows: int = 2  # examples (or pairs) in the one batch that every step sees
    length: int = 512  # tokens of every sequence
    prompt: int = 130  # of these, in the prompt: 4 x 382 = 1528 completion tokens in a DPO batch
    embedding_std: float = 0.1  # logits with std of about 2: a label shifted by one changes the loss
    lora_r: int = 64
    lora_alpha: int = 128
    lora_dropout: float = 0.05
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    learning_rate: float = 1e-4
    beta: float = 0.1
    seed: int = 0

    def fingerprint(self) -> str:
        """Names the folder: another workload is another folder."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


def make_rows(work: Workload) -> list[dict[str, list[int]]]:
    """Rows with `prompt_ids`, `chosen_ids`, `rejected_ids`; both answers end with the stop token."""
    draw = random.Random(work.seed)

    def words(count: int) -> list[int]:
        return [draw.randrange(EOS + 1, min(WORDS, work.vocab_size)) for _ in range(count)]

    answer = work.length - work.prompt
    return [
        {
            "prompt_ids": words(work.prompt),
            "chosen_ids": [*words(answer - 1), EOS],
            "rejected_ids": [*words(answer - 1), EOS],
        }
        for _ in range(work.rows)
    ]


def as_text(ids: list[int]) -> str:
    """The text that the workload's tokenizer turns into `ids`."""
    return " ".join("<eos>" if token == EOS else f"t{token}" for token in ids)


def load_rows(folder: Path) -> list[dict[str, list[int]]]:
    """What `prepare` wrote."""
    rows: list[dict[str, list[int]]] = json.loads((folder / ROWS).read_text())
    return rows


def prepare(work: Workload, cache: Path) -> Path:
    """The folder with model, tokenizer and rows; made on first use, complete or not there at all."""
    folder = cache / f"train-{work.fingerprint()}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix="partial-", dir=cache))
    try:
        _save_model(work, partial)
        _save_tokenizer(work, partial)
        (partial / ROWS).write_text(json.dumps(make_rows(work)))
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _save_model(work: Workload, folder: Path) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.utils import logging

    torch.manual_seed(work.seed)
    config = Qwen2Config(
        vocab_size=work.vocab_size,
        hidden_size=work.hidden_size,
        intermediate_size=work.intermediate_size,
        num_hidden_layers=work.layers,
        num_attention_heads=work.heads,
        num_key_value_heads=work.kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    model: Any = Qwen2ForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=work.embedding_std)
    logging.disable_progress_bar()
    # Stored in bf16, so that bf16 and fp32 variants start from the very same numbers.
    model.to(torch.bfloat16).save_pretrained(folder)


def _save_tokenizer(work: Workload, folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<eos>" if token == EOS else f"t{token}": token for token in range(work.vocab_size)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")
    # SFT trainers ask for a template even for rows that are tokens already.
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    tokenizer.save_pretrained(folder)
