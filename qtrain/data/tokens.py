"""Encoded rows in a few flat arrays: four bytes a token, whatever the number of rows."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from qtrain.data.report import DatasetReport
from qtrain.data.rows import Source
from qtrain.data.template import ChatEncoder, EncodedExample, EncodedPair

Encoded = EncodedExample | EncodedPair


class TokenDataset:
    """Encoded rows, map-style: `dataset[i]` is an EncodedExample (sft) or an EncodedPair (dpo).

    Attributes:
        report: what was read, counted and cut.
        fingerprint: SHA-256 over all ids and masks; the same tokens give the same fingerprint.
        encoder: the ChatEncoder that was used.
    """

    def __init__(self, parts: TokenStore, report: DatasetReport, encoder: ChatEncoder) -> None:
        self.report = report
        self.encoder = encoder
        self._files = parts.files
        self._ids = np.frombuffer(parts.ids, dtype=np.int32)
        self._mask = np.frombuffer(parts.mask, dtype=np.uint8)
        # Start of each part of each row: one part an example, three (prompt, chosen, rejected) a pair.
        self._starts = np.frombuffer(parts.starts, dtype=np.int64).reshape(-1, parts.per_row)
        self._places = np.frombuffer(parts.places, dtype=np.int64).reshape(-1, 3)  # file, line, cut
        digest = hashlib.sha256(f"{parts.per_row}".encode())
        for values in (self._ids, self._mask, self._starts):
            digest.update(values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Encoded:
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        file, line, cut = self._places[index].tolist()
        source = Source(self._files[file], line)
        end = self._starts[index + 1, 0] if index + 1 < len(self) else len(self._ids)
        borders = [*self._starts[index].tolist(), int(end)]
        pieces = [self._ids[a:b].tolist() for a, b in pairwise(borders)]
        if len(pieces) == 3:
            return EncodedPair(pieces[0], pieces[1], pieces[2], source, cut)
        mask = self._mask[borders[0] : borders[1]].astype(bool).tolist()
        return EncodedExample(pieces[0], mask, source, cut)

    def __iter__(self) -> Iterator[Encoded]:
        return (self[index] for index in range(len(self)))


class TokenStore:
    """Grows the flat arrays of a TokenDataset."""

    def __init__(self, per_row: int) -> None:
        self.per_row = per_row
        self.ids, self.mask = array("i"), array("B")
        self.starts, self.places = array("q"), array("q")
        self.files: list[str] = []

    def append(self, row: Encoded) -> None:
        if isinstance(row, EncodedPair):
            pieces = [row.prompt_ids, row.chosen_ids, row.rejected_ids]
        else:
            pieces = [row.input_ids]
            self.mask.extend(row.supervised)
        for piece in pieces:
            self.starts.append(len(self.ids))
            self.ids.extend(piece)
        if not self.files or self.files[-1] != row.source.file:
            self.files.append(row.source.file)
        self.places.extend((len(self.files) - 1, row.source.line, row.cut))
