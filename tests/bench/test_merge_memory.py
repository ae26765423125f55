"""A merge holds a shard, not a model: a stand-in for `python -m qtrain.bench.merge_memory --size 3GB`."""

from __future__ import annotations

from pathlib import Path

from qtrain.bench.merge_memory import make_adapter, make_model, measure


def test_peak_memory_is_a_shards_not_the_models(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    make_model(base, 120_000_000, 10_000_000, hidden=512)
    make_adapter(adapter, base, rank=8)
    sizes = [path.stat().st_size for path in base.glob("*.safetensors")]
    found = measure(base, adapter, tmp_path / "out", "dequantized", report=False)
    assert sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) == sum(sizes)
    # twice the largest shard, and what is allocated once: buffers of float64 products, threads, slack
    # (45 MB whatever the model's size)
    bound = 2 * max(sizes) + 64e6
    assert found["peak"] - found["before"] < bound / 2**20
    assert bound < 0.75 * sum(sizes)
