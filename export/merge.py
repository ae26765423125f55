"""Base and adapter written as one checkpoint, one of the base's shards at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

from .checkpoint import Checkpoint
from .disk import check_room
from .errors import ExportError
from .merged_weights import MergedWeights
from .tensors import check_finite
from .writer import CheckpointWriter

Progress = Callable[[str, int], None]  # (file, bytes of the base's weights that were read)


def write_merged(
    writer: CheckpointWriter, weights: MergedWeights, progress: Progress = lambda *_: None
) -> None:
    """Write every tensor, shard by shard: a shard in which nothing changes is copied byte for byte.

    Memory: the pages of one of the base's shards, the weight that is being computed, and little else.

    Raises:
        ExportError: NaN by name, values beyond the dtype, a full disk.
    """
    checkpoint = weights.checkpoint
    check_room(merged_bytes(weights), writer.out)
    for file in checkpoint.files:
        names = checkpoint.names_in(file)
        size = sum(checkpoint.specs[name].nbytes for name in names)
        with checkpoint.reading(file) as reader:
            if (
                weights.touches(file)
                or size > writer.max_shard_bytes
                or _holds_more(checkpoint, file, reader)
            ):
                specs = [weights.spec(name) for name in names]
                writer.write(specs, lambda spec: weights.blocks(spec.name, reader.get_tensor(spec.name)))
            else:
                for name in names:
                    check_finite(name, reader.get_tensor(name), checkpoint.folder / file)
                writer.copy_shard(checkpoint.folder / file)
        progress(file, size)


def merged_bytes(weights: MergedWeights) -> int:
    """Bytes of the merged weights."""
    return sum(weights.spec(name).nbytes for name in weights.checkpoint.specs)


def merged_config(weights: MergedWeights) -> dict[str, Any] | bytes:
    """config.json: the base's bytes, or with another dtype."""
    path = weights.checkpoint.folder / "config.json"
    if weights.dtype is None:
        return path.read_bytes()
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    name = str(weights.dtype).removeprefix("torch.")
    if name == config.get("dtype", config.get("torch_dtype")):
        return path.read_bytes()
    config.pop("torch_dtype", None)  # the name that `dtype` had before transformers 5
    return config | {"dtype": name}


def check_tied(weights: MergedWeights) -> dict[str, Any]:
    """What becomes of tied embeddings, for the report.

    Raises:
        ExportError: the adapter changes one end of the tie.
    """
    checkpoint = weights.checkpoint
    tied = checkpoint.ties_embeddings
    ends = [name for name in ("lm_head.weight", "model.embed_tokens.weight") if name in checkpoint.specs]
    changed = [
        name for name in ends if weights.adapter is not None and _module_of(name) in weights.adapter.shapes
    ]
    if tied and changed:
        raise ExportError(
            f"the adapter changes {changed[0]}, and config.json ties the head to the embedding, so that both "
            "would change; train without it, or store both in the base and set tie_word_embeddings to false"
        )
    return {"tie_word_embeddings": tied, "stored": ends, "note": checkpoint.check_tied_head()}


def parse_dtype(name: str) -> torch.dtype | None:
    """bf16, fp16, fp32; `stored` is None: each tensor keeps its dtype.

    Raises:
        ExportError: another name.
    """
    names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "stored": None}
    if name not in names:
        raise ExportError(f"--dtype is {name}, must be one of {', '.join(names)}")
    return names[name]


def _module_of(name: str) -> str:
    return name.rpartition(".")[0]


def _holds_more(checkpoint: Checkpoint, file: str, reader: Any) -> bool:
    """Whether a file has tensors that the index does not list: a copy would bring them along."""
    return set(reader.keys()) != set(checkpoint.names_in(file))
