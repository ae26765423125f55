"""From encoded rows to one forward pass: tokens, positions, and the rows of hidden states to score.

A token at place t + 1 is predicted by the hidden state at place t: `label_rows` holds the t's and
`labels` the tokens, for supervised tokens only. So neither prompts nor padding ever reach the head,
and padding is told by its place, never by its token id.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from qtrain.data.template import EncodedExample, EncodedPair
from qtrain.model.layout import Block, Layout

Batch = dict[str, Any]


@dataclass(slots=True)
class _Places:
    """Lists that grow sequence by sequence."""

    input_ids: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    label_rows: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # supervised tokens of each sequence
    blocks: list[Block] = field(default_factory=list)

    def append(self, ids: Sequence[int], supervised: Sequence[bool]) -> None:
        """One whole sequence."""
        start = len(self.input_ids)
        self._extend(ids, range(len(ids)))
        places = [t for t in range(1, len(ids)) if supervised[t]]
        self._score([start + t - 1 for t in places], [ids[t] for t in places])
        self.blocks.append(Block(start, start + len(ids)))

    def append_pair(self, prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]) -> None:
        """A prompt, then the chosen and the rejected answer, each of which sees the prompt and itself."""
        start, end = len(self.input_ids), len(prompt)
        self._extend([*prompt, *chosen], range(end + len(chosen)))
        first = start + end - 1  # the last token of the prompt predicts the first of either answer
        self._score([first + t for t in range(len(chosen))], chosen)
        middle = len(self.input_ids)
        self._extend(rejected, range(end, end + len(rejected)))
        self._score([first, *range(middle, middle + len(rejected) - 1)], rejected)
        self.blocks.append(Block(start, middle))
        self.blocks.append(Block(middle, middle + len(rejected), start, start + end))

    def _extend(self, ids: Sequence[int], positions: range) -> None:
        self.input_ids.extend(ids)
        self.position_ids.extend(positions)

    def _score(self, rows: Sequence[int], labels: Sequence[int]) -> None:
        self.label_rows.extend(rows)
        self.labels.extend(labels)
        self.lengths.append(len(labels))


Sequences = list[tuple[Sequence[int], Sequence[bool]]]


def _packed(places: _Places, rows: list[int]) -> Batch:
    return {
        "input_ids": torch.tensor([places.input_ids]),  # [1, T]
        "position_ids": torch.tensor([places.position_ids]),  # [1, T]
        "layout": Layout(tuple(places.blocks)),
        "label_rows": torch.tensor(places.label_rows),  # [L]
        "labels": torch.tensor(places.labels),  # [L]
        "lengths": places.lengths,
        "rows": rows,
    }


def _padded(sequences: Sequences, rows: list[int], pad_token_id: int) -> Batch:
    width = max(len(ids) for ids, _ in sequences)
    input_ids = torch.full((len(sequences), width), pad_token_id)
    attention_mask = torch.zeros(len(sequences), width, dtype=torch.int64)
    places = _Places()
    for number, (ids, supervised) in enumerate(sequences):
        input_ids[number, : len(ids)] = torch.tensor(ids)
        attention_mask[number, : len(ids)] = 1
        targets = [t for t in range(1, len(ids)) if supervised[t]]
        places._score([number * width + t - 1 for t in targets], [ids[t] for t in targets])
    return {
        "input_ids": input_ids,  # [B, T], padded on the right
        "attention_mask": attention_mask,  # [B, T]
        "label_rows": torch.tensor(places.label_rows),
        "labels": torch.tensor(places.labels),
        "lengths": places.lengths,
        "rows": rows,
    }


def _pair_sequences(pairs: Sequence[EncodedPair]) -> Sequences:
    """chosen 0, rejected 0, chosen 1, rejected 1, ... with only the answers supervised."""
    return [
        ([*pair.prompt_ids, *answer], [False] * len(pair.prompt_ids) + [True] * len(answer))
        for pair in pairs
        for answer in (pair.chosen_ids, pair.rejected_ids)
    ]


def sft_collator(*, packed: bool, pad_token_id: int) -> Callable[[list[tuple[int, EncodedExample]]], Batch]:
    """Batches of whole sequences: laid end to end ([1, T]) or padded ([B, T])."""

    def collate(items: list[tuple[int, EncodedExample]]) -> Batch:
        rows = [number for number, _ in items]
        if not packed:
            return _padded([(e.input_ids, e.supervised) for _, e in items], rows, pad_token_id)
        places = _Places()
        for _, example in items:
            places.append(example.input_ids, example.supervised)
        return _packed(places, rows)

    return collate


def pair_collator(
    *, packed: bool, share_prompts: bool, pad_token_id: int
) -> Callable[[list[tuple[int, EncodedPair]]], Batch]:
    """Batches of pairs; `lengths` alternates chosen and rejected. Shared prompts need packing."""

    def collate(items: list[tuple[int, EncodedPair]]) -> Batch:
        rows = [number for number, _ in items]
        pairs = [pair for _, pair in items]
        if not packed:
            return _padded(_pair_sequences(pairs), rows, pad_token_id)
        places = _Places()
        if share_prompts:
            for pair in pairs:
                places.append_pair(pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
        else:
            for ids, supervised in _pair_sequences(pairs):
                places.append(ids, supervised)
        return _packed(places, rows)

    return collate


def sequence_sums(logp: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Sum of the log-probs of each sequence, [S]; a fixed order of additions, unlike a scatter."""
    return torch.stack([part.sum() for part in torch.split(logp, lengths)])


class Numbered(torch.utils.data.Dataset[tuple[int, Any]]):
    """A dataset whose items carry their number: what an error names and what the reference is kept by."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.rows[index]
