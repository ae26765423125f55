"""The streamed model computes what transformers and peft compute, and the figures are what they say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qtrain.export.agreement import agreement
from qtrain.export.checkpoint import Checkpoint
from qtrain.export.lora import Adapter
from qtrain.export.merge import merged_config, write_merged
from qtrain.export.merge_report import merge_report
from qtrain.export.merged_weights import MergedWeights
from qtrain.export.nf4_base import NF4Settings
from qtrain.export.stops import check_stop
from qtrain.export.streamed_model import StreamedModel
from qtrain.export.writer import CheckpointWriter
from tests.export.folders import ARCHITECTURES, save_adapter, save_model

WINDOWS = [list(range(3, 40)), list(range(100, 110)), [7]]


def _theirs(model: Any) -> list[Tensor]:
    with torch.inference_mode():
        return [model(torch.tensor([window])).logits[0] for window in WINDOWS]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_streamed_logits_are_transformers(architecture: str, tmp_path: Path) -> None:
    """Windows of different lengths together, weights one at a time, against one window after another."""
    from transformers import AutoModelForCausalLM

    folder = save_model(tmp_path / "m", architecture)
    streamed = StreamedModel(folder, Checkpoint.open(folder).mapped)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for ours, theirs in zip(streamed.hidden_states(WINDOWS), _theirs(model), strict=True):
        # the same float32 arithmetic in batches of another shape
        torch.testing.assert_close(streamed.logits(ours), theirs, rtol=1e-4, atol=1e-4)


def test_streaming_holds_no_weights(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m")
    streamed = StreamedModel(folder, Checkpoint.open(folder).mapped)
    streamed.hidden_states(WINDOWS)
    assert all(parameter.is_meta for parameter in streamed._model.parameters())


def _write(folder: Path, adapter: Path, out: Path, **options: Any) -> MergedWeights:
    weights = MergedWeights(Checkpoint.open(folder), Adapter.open(adapter), **options)
    with CheckpointWriter(out) as writer:
        write_merged(writer, weights)
        writer.seal(merged_config(weights))
        writer.publish()
    return weights


@pytest.mark.parametrize("written", ["original", "dequantized"])
def test_the_report_of_a_4_bit_run(written: str, tmp_path: Path) -> None:
    """Against peft over a model that transformers loaded in 4 bits."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    base = save_model(tmp_path / "base", intermediate_size=128)
    adapter = save_adapter(tmp_path / "adapter", base)
    settings = NF4Settings(True, torch.float32)
    weights = _write(base, adapter, tmp_path / "out", base=written, nf4=settings)
    report = merge_report(
        weights, tmp_path / "out", WINDOWS, trained_on=settings, compute_dtype=torch.float32
    )
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    on = _theirs(PeftModel.from_pretrained(model, str(adapter)).eval())
    merged = _theirs(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32))
    found = report["bases"][written]
    assert found["written"]
    kl = torch.cat([_kl(a, b) for a, b in zip(on, merged, strict=True)])
    assert found["kl"] == pytest.approx(
        float(kl.mean()), rel=1e-3, abs=1e-6
    )  # float32 forwards of other shapes
    assert found["kl_max"] == pytest.approx(float(kl.max()), rel=1e-3, abs=1e-6)
    difference = max(float((a - b).abs().max()) for a, b in zip(on, merged, strict=True))
    assert found["max_logit_difference"] == pytest.approx(difference, rel=1e-3, abs=1e-4)
    same = torch.cat([(a.argmax(-1) == b.argmax(-1)).float() for a, b in zip(on, merged, strict=True)])
    assert found["top1"] == pytest.approx(float(same.mean()))
    assert found["positions"] == sum(map(len, WINDOWS))
    # the base that it was trained on keeps what was learnt; NF4 of a random model is far from it
    assert report["bases"]["dequantized"]["kl"] < report["bases"]["original"]["kl"] / 20


def _kl(p: Tensor, q: Tensor) -> Tensor:
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def test_the_report_of_a_16_bit_run_and_both_orders_of_bases(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", dtype=torch.float32)
    adapter = save_adapter(tmp_path / "adapter", base)
    weights = _write(base, adapter, tmp_path / "out")
    report = merge_report(weights, tmp_path / "out", WINDOWS, trained_on=None, compute_dtype=torch.float32)
    assert list(report["bases"]) == ["original"]
    found = report["bases"]["original"]
    assert found["top1"] == 1.0
    assert found["kl"] < 1e-8  # fp32 weights: rounding alone
    assert found["max_logit_difference"] < 1e-3
    assert found["perplexity_p"] == pytest.approx(found["perplexity_q"], rel=1e-4)


def test_figures_worked_by_hand() -> None:
    log = math.log
    p = torch.tensor([[log(1), log(3)], [log(1), log(1)], [0.0, 0.0]])
    q = torch.tensor([[log(1), log(1)], [log(3), log(1)], [0.0, 0.0]])
    found = agreement([[1, 1, 0]], ([p], lambda rows: rows), ([q], lambda rows: rows), rows=2)
    kl = [0.25 * log(0.5) + 0.75 * log(1.5), 0.5 * log(0.5 / 0.75) + 0.5 * log(0.5 / 0.25), 0.0]
    assert found.kl == pytest.approx(sum(kl) / 3, rel=1e-6)
    assert found.kl_max == pytest.approx(max(kl), rel=1e-6)
    assert found.top1 == pytest.approx(1 / 3 + 1 / 3)  # 1 vs 0 (ties take the first), 0 vs 0, 0 vs 0
    assert found.max_logit_difference == pytest.approx(log(3))
    assert found.perplexity_p == pytest.approx(math.exp(-(log(0.75) + log(0.5)) / 2))
    assert found.perplexity_q == pytest.approx(math.exp(-(log(0.5) + log(0.75)) / 2))
    assert found.positions == 3


def test_stops(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    assert check_stop(tmp_path, "<|im_end|>", 5) == {
        "turn_end": "<|im_end|>",
        "turn_end_id": 5,
        "eos_token_id": [5],
        "read_from": "config.json",
        "note": None,
    }
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    note = check_stop(tmp_path, "<|im_end|>", 5)["note"]
    assert note == (
        "the chat template ends an answer with <|im_end|> (5), and generation_config.json stops at 3, 4: "
        "served answers would not stop; put 5 into its eos_token_id"
    )
    assert check_stop(tmp_path, "</s>", 4)["note"] is None
    for path in tmp_path.iterdir():
        path.write_text("{}")
    assert "names no stop token" in check_stop(tmp_path, "</s>", 4)["note"]
