"""`qtrain export verify --reader`: a folder through other people's code, against our reading of its files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from qtrain.errors import UserError
from qtrain.export.checkpoint import HEAD
from qtrain.export.errors import GateFailed
from qtrain.export.quantized_checkpoint import QuantizedCheckpoint
from qtrain.export.streamed_model import StreamedModel
from qtrain.export.verify import remembering

from .readers import Comparison, compare, missing, read_with
from .verdict import say

LENGTH, COUNT, NEW = 64, 4, 16  # tokens of a window, windows, tokens made
# Root mean square of the differences of log-probs: short floats leave hundredths, a module read wrongly
# leaves ones.
SPREAD = 0.1


def check_readers(readers: Sequence[str]) -> None:
    """Refuse readers that can't be run.

    Raises:
        UserError: unknown, or not installed, with the command that installs it.
    """
    for reader in readers:
        reason = missing(reader)
        if reason:
            raise UserError(f"--reader {reader}: is {reason}")


def compare_reader(
    reader: str, folder: Path, rows: Sequence[Sequence[int]], threads: int, console: Console
) -> Comparison:
    """Let a reader read the folder, and hold its log-probs and greedy tokens against ours.

    Args:
        rows: token ids; windows of one length are cut from them, laid end to end.

    Raises:
        GateFailed: the reader's numbers are not those of the files.
        ReaderFailed: it can't read the folder.
    """
    windows = _windows(rows)
    prompts = [window[: len(window) // 2] for window in windows]
    quantized = QuantizedCheckpoint.open(folder)
    model = StreamedModel(folder, remembering(quantized.weight, HEAD))

    def logits(tokens: Tensor) -> Tensor:
        states = model.hidden_states(tokens.tolist())
        return torch.stack([model.logits(its) for its in states])

    say(console, f"reading with {reader}: {len(windows)} windows of {len(windows[0])} tokens")
    reading = read_with(reader, folder, windows, prompts, new_tokens=NEW, threads=threads)
    found = compare(reading, windows, logits)
    versions = ", ".join(f"{name} {value}" for name, value in reading.facts.items())
    say(
        console,
        f"{reader} ({versions}): log-probs differ by {found.spread:.2g} (root mean square; largest "
        f"{found.difference:.2g}); {found.greedy_same} of {found.greedy_tokens} greedy tokens are ours; "
        f"{reading.seconds:.0f} s",
    )
    if not found.spread <= SPREAD:
        raise GateFailed(
            f"{reader} reads another model in {folder}: its log-probs differ by {found.spread:.3g} (root "
            f"mean square), above {SPREAD:g}; serve it with another reader, or export with another --format"
        )
    return found


def _windows(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    tokens = [token for row in rows for token in row]
    length = min(LENGTH, len(tokens))
    count = min(COUNT, len(tokens) // length)
    return [tokens[first * length : (first + 1) * length] for first in range(count)]
