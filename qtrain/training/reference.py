"""The reference's log-probs of a DPO run: computed once, streamed to the run directory, reused on resume."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qtrain.runs.atomic import disk_errors, file_sha256, write_json

from .batch import Batch, sequence_sums


def reference_key(*parts: str) -> str:
    """What the log-probs depend on (rows, base, adapter, dtype), as one hash."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def reference_logps(
    score: Callable[[list[int]], Tensor],
    rows: int,
    path: Path,
    *,
    key: str,
    batch_size: int,
    shard: tuple[int, int] = (0, 1),
    advance: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """Summed log-probs of chosen and rejected answers under the reference, [rows, 2] float32.

    `score(numbers)` gives [len(numbers), 2]. What was already computed for the same `key` is read from
    `path` (or from its `.partial`, up to where a killed process came); the rest is computed and written
    batch by batch. `shard` is (process, processes): each computes its share and all get the whole.
    """
    finished = _read_finished(path, key, rows)
    if finished is not None:
        advance(rows)
        return finished
    rank, world = shard
    partial = path.with_name(f"{path.name}.{rank}-of-{world}.partial")
    with disk_errors("the reference's log-probs", path):
        table = _open_partial(partial, key, rows)
        missing = [number for number in range(rank, rows, world) if np.isnan(table[number]).any()]
        advance(rows - len(missing) * world)
        for start in range(0, len(missing), batch_size):
            numbers = missing[start : start + batch_size]
            table[numbers] = score(numbers).float().cpu().numpy()
            table.flush()
            advance(len(numbers) * world)
        whole = _gather(torch.from_numpy(np.array(table)), world)
        if rank == 0:
            _write_finished(path, key, whole)
        partial.unlink()
        _key_file(partial).unlink()
    return whole


def score_pairs(
    model: nn.Module, collate: Callable[[list[Any]], Batch], rows: Any, device: torch.device
) -> Any:
    """A `score` for `reference_logps`: the model as it is, in eval mode, without gradients."""

    def score(numbers: list[int]) -> Tensor:
        batch = collate([(number, rows[number]) for number in numbers])
        inputs = {
            name: batch[name].to(device) if isinstance(batch[name], Tensor) else batch[name]
            for name in ("input_ids", "attention_mask", "position_ids", "layout", "label_rows", "labels")
            if name in batch
        }
        was_training = model.training
        model.eval()
        with torch.no_grad():
            logp = model(**inputs)["logp"]
        model.train(was_training)
        return sequence_sums(logp, batch["lengths"]).view(-1, 2)

    return score


def _key_file(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _read_finished(path: Path, key: str, rows: int) -> Tensor | None:
    try:
        note = json.loads(_key_file(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    if note.get("key") != key or not path.is_file() or file_sha256(path) != note.get("sha256"):
        return None
    table = np.load(path)
    return torch.from_numpy(table) if table.shape == (rows, 2) else None


def _write_finished(path: Path, key: str, table: Tensor) -> None:
    # a fixed temporary name, so that what a killed process left is overwritten
    temporary = path.with_name(f".{path.name}.npy")
    np.save(temporary, table.numpy())
    temporary.replace(path)
    write_json(_key_file(path), {"key": key, "sha256": file_sha256(path), "columns": ["chosen", "rejected"]})


def _open_partial(path: Path, key: str, rows: int) -> np.memmap[Any, Any]:
    """NaN marks what is not computed yet."""
    note = _key_file(path)
    try:
        same = json.loads(note.read_text(encoding="utf-8")) == {"key": key, "rows": rows}
    except (FileNotFoundError, ValueError):
        same = False
    if not (same and path.is_file() and path.stat().st_size == rows * 8):
        np.full((rows, 2), np.nan, dtype=np.float32).tofile(path)
        write_json(note, {"key": key, "rows": rows})
    return np.memmap(path, dtype=np.float32, mode="r+", shape=(rows, 2))


def _gather(table: Tensor, world: int) -> Tensor:
    """Every process computed other rows; the others are NaN."""
    if world == 1:
        return table
    parts: list[Any] = [None] * world
    torch.distributed.all_gather_object(parts, table)
    return torch.stack(parts).nan_to_num().sum(dim=0)
