"""A tiny byte-level tokenizer trained on the spot, and chat templates of the well-known kinds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtrain.data.rows import Conversation, Message, PreferencePair, Source

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]", "<|begin_of_text|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
]  # fmt: skip

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN25 = (
    "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helper.<|im_end|>\n' }}{% endif %}" + CHATML
)
# Reasoning of earlier turns is taken out; the last turn always has a <think> block.
QWEN3 = """
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set content = m.content %}{%- set thought = '' %}
{%- if '</think>' in content %}
{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last %}
{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else %}{{- content }}{%- endif %}
{{- '<|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' "
    "+ m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
NO_STOP = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# As DeepSeek-R1's: the prompt opens a thought which the rendered answer does not have.
OPENS_THOUGHT = CHATML.replace("'<|im_start|>assistant\n' }}", "'<|im_start|>assistant\n<think>\n' }}")
DROPS_SYSTEM = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")

TEMPLATES = {
    "chatml": CHATML,
    "qwen2.5": QWEN25,
    "qwen3": QWEN3,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "no stop": NO_STOP,
    "opens thought": OPENS_THOUGHT,
    "drops system": DROPS_SYSTEM,
}
ENDS = {"llama3": ("<|begin_of_text|>", "<|eot_id|>"), "mistral": ("<s>", "</s>")}


@pytest.fixture(scope="session")
def bpe() -> Any:
    """A byte-level BPE of a few hundred tokens, with the special tokens of all templates."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    # as Llama 3 and Qwen split: a line break never joins what follows it
    split = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+"), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    text = [
        "user assistant system hello world the quick brown fox\n\n \n<think>\n</think>\n\nanswer 12 { } []"
    ] * 4
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def make_tokenizer(bpe: Any) -> Callable[..., Any]:
    """tokenizer(template name or None, bos=..., eos=..., pad=..., adds_bos=..., gpt2=...)."""
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    def make(
        name: str | None = "chatml",
        *,
        adds_bos: bool = False,
        gpt2: bool = False,
        pad: str | None = None,
        **names: str,
    ) -> Any:
        bos, eos = ENDS.get(name or "", ("<s>" if adds_bos else None, "<|im_end|>"))
        bos, eos = names.get("bos", bos), names.get("eos", eos)
        inner = Tokenizer.from_str(bpe.to_str())
        if gpt2:  # splits "\n\n" in another way when a letter follows
            inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        if adds_bos:
            inner.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, inner.token_to_id(bos))]
            )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=inner, bos_token=bos, eos_token=eos, pad_token=pad or eos, model_max_length=64
        )
        tokenizer.chat_template = None if name is None else TEMPLATES[name]
        return tokenizer

    return make


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Any], str]:
    """write(name, text or bytes or list of rows) -> path; rows are written as json lines."""

    def put(name: str, content: Any) -> str:
        path = tmp_path / name
        if isinstance(content, list):
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return put


def _turns(pairs: tuple[tuple[str, ...], ...]) -> tuple[Message, ...]:
    return tuple(Message(*pair) for pair in pairs)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def talk() -> Callable[..., Conversation]:
    """talk((role, content[, reasoning]), ...) -> Conversation at talk.jsonl:7."""
    return lambda *pairs: Conversation(_turns(pairs), Source("talk.jsonl", 7))


@pytest.fixture(scope="session")
def preference() -> Callable[..., PreferencePair]:
    """preference(prompt, chosen, rejected[, chosen's reasoning]) -> PreferencePair at pairs.jsonl:5."""

    def make(prompt: str, chosen: str, rejected: str, thought: str | None = None) -> PreferencePair:
        sides = (Message("assistant", chosen, thought),), (Message("assistant", rejected),)
        return PreferencePair((Message("user", prompt),), *sides, Source("pairs.jsonl", 5))

    return make
