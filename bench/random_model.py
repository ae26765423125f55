"""Model folders of random weights and of any shape, written without holding them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "dtype": "bfloat16",
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


def write_random_model(folder: Path, config: dict[str, Any], shard: int, seed: int = 0) -> None:
    """A folder of bf16 weights (normal, std 0.02) in shards of at most `shard` bytes.

    Args:
        config: what config.json holds.
    """
    import torch
    from torch import Tensor

    from qtrain.export.nf4_base import empty_model
    from qtrain.export.tensors import TensorSpec
    from qtrain.export.writer import CheckpointWriter

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    specs = [
        TensorSpec(name, torch.bfloat16, tuple(parameter.shape))
        for name, parameter in empty_model(folder).named_parameters()
    ]
    torch.manual_seed(seed)
    piece = (
        torch.randn(2**20).mul_(0.02).bfloat16()
    )  # the same values over and over: making them costs no time

    def blocks(spec: TensorSpec) -> Iterator[Tensor]:
        left = spec.nbytes // 2
        while left > 0:
            yield piece[:left]
            left -= piece.numel()

    with CheckpointWriter(folder, max_shard_bytes=shard, force=True) as writer:
        writer.write(specs, blocks)
        writer.seal(config)
        writer.publish()
