"""Windows of tokens to calibrate on: full ones only, so that no padding is ever looked at."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import ExportError

FEW = 8  # windows below which a note is due


@dataclass(frozen=True, slots=True)
class Calibration:
    """Token windows and where they come from.

    Attributes:
        windows: [n, T] int64.
        rows: rows that have a token in them.
        available: rows there were.
        wanted: windows that were asked for.
        seed: of the order of rows.
        source: what the rows were read from.
    """

    windows: Tensor
    rows: int
    available: int
    wanted: int
    seed: int
    source: str

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.windows.numel()

    @property
    def sha256(self) -> str:
        """Of the token ids."""
        return hashlib.sha256(self.windows.contiguous().numpy().tobytes()).hexdigest()

    def note(self) -> str | None:
        """A line where there are fewer windows than asked for, or few at all."""
        count, length = self.windows.shape
        if count < self.wanted:
            return (
                f"calibration: {self.source} fills {count} windows of {length} tokens, not {self.wanted}; "
                "more rows (--calib-data) usually mean a smaller error"
            )
        if count < FEW:
            return f"calibration: {self.tokens} tokens are few; {FEW} windows or more are advised (--calib)"
        return None

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        count, length = self.windows.shape
        return {
            "source": self.source,
            "windows": count,
            "window_length": length,
            "tokens": self.tokens,
            "rows": self.rows,
            "rows_available": self.available,
            "seed": self.seed,
            "sha256": self.sha256,
        }


def pack_windows(
    rows: Sequence[Sequence[int]], length: int, count: int, *, seed: int = 0, source: str = "the rows"
) -> Calibration:
    """Lay rows end to end in a random order and cut windows of `length` tokens; the last, partial one goes.

    Args:
        rows: token ids of each row, as training sees them; one that is longer than a window goes on in the
            next.
        length: tokens of a window.
        count: windows wanted; fewer rows give fewer.
        seed: the same rows and seed give the same windows.
        source: what to call the rows in messages.

    Raises:
        ExportError: the rows do not fill one window.
    """
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    tokens: list[int] = []
    used = 0
    for index in order:
        if len(tokens) >= length * count:
            break
        tokens.extend(rows[index])
        used += 1
    full = min(count, len(tokens) // length)
    if full < 1:
        raise ExportError(
            f"calibration: the {len(rows)} rows of {source} hold {len(tokens)} tokens, less than one window "
            f"of {length}; give more rows (--calib-data) or shorter windows (--calib-length)"
        )
    windows = torch.tensor(tokens[: full * length], dtype=torch.int64).view(full, length)
    return Calibration(windows, used, len(rows), count, seed, source)


def check_windows(calibration: Calibration, config: Any) -> None:
    """Refuse windows that the model can't take.

    Args:
        config: transformers' config of the model.

    Raises:
        ExportError: longer than max_position_embeddings, or ids outside of the vocabulary.
    """
    length, limit = calibration.windows.shape[1], getattr(config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise ExportError(
            f"calibration: windows of {length} tokens, but the model's max_position_embeddings is {limit}; "
            "give shorter ones (--calib-length)"
        )
    largest, smallest = int(calibration.windows.max()), int(calibration.windows.min())
    if largest >= config.vocab_size or smallest < 0:
        wrong = largest if largest >= config.vocab_size else smallest
        raise ExportError(
            f"calibration: token id {wrong} is outside of the vocabulary (0 .. {config.vocab_size - 1}); "
            "the rows were encoded with another tokenizer"
        )
