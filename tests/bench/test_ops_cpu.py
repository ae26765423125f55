"""The CPU benchmark of the ops: it compares results before it times, and times both sides."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from qtrain.bench.ops_cpu import measure
from qtrain.bench.ops_cpu_cases import Case, logprob_case, lora_case


def _cases() -> list[Case]:
    widths = {"gate_proj": 96, "up_proj": 80}
    return [
        lora_case("pair", 64, widths, True, 24, torch.float32),
        logprob_case(12, 16, 300, torch.float32),
    ]


@pytest.mark.parametrize("index", [0, 1])
def test_both_sides_agree_and_are_timed(index: int) -> None:
    row = measure(_cases()[index], rounds=2)
    assert row.difference < 1e-4
    assert len(row.ours_cpu_s) == len(row.theirs_cpu_s) == 2
    assert row.time.low <= row.time.estimate <= row.time.high


@pytest.mark.parametrize("index", [0, 1])
def test_no_speed_is_reported_for_wrong_results(index: int) -> None:
    case = _cases()[index]
    ours, theirs = case.gate()
    wrong = [tensor * (1.01 if number == 1 else 1) for number, tensor in enumerate(ours)]
    with pytest.raises(RuntimeError, match="results differ by"):
        measure(dataclasses.replace(case, gate=lambda: (wrong, theirs)), rounds=1)
