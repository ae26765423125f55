"""The pytest-benchmark suites are run by hand; here only that they can be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def collected(*words: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_every_op_has_ours_and_the_baselines() -> None:
    names = collected("bench/suites")
    for op in ("lora_linear", "lora_linear_group", "nf4_dequantize", "linear_logprob"):
        its = [name for name in names if f"[{op} " in name]
        for variant in ("qtrain", "eager PyTorch", "torch.compile"):
            assert any(f"forward {variant}]" in name for name in its), (op, variant)
    assert not any("(again)" in name for name in names)
