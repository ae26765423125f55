"""A GPTQ export holds a layer, not a model: a stand-in for `python -m qtrain.bench.gptq_memory`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qtrain.bench.gptq_memory import main
from qtrain.bench.result_files import read_results

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 3072,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 8192,
}


def test_peak_memory_does_not_grow_with_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # what is freed goes back at once: what malloc keeps differs from run to run by some 30 MiB
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    result = tmp_path / "memory.json"
    words = ["--layers", "2", "6", "--windows", "2", "--length", "64", "--shape", json.dumps(SHAPE)]
    main([*words, "--words", "--group-size 64", "--folder", str(tmp_path), "--json", str(result)])
    rows = json.loads(result.read_text())["rows"]
    above = [row["figures"]["memory"] for row in rows]
    sizes = [row["details"]["base_bytes"] for row in rows]
    # four more layers in bf16 are 21 MB, and in the float32 that they are computed in 42
    assert above[1] - above[0] < 10 * 2**20
    assert sizes[1] - sizes[0] > 20e6
    assert [dict(row.shape)["layers"] for row in read_results(result).rows] == [2, 6]
