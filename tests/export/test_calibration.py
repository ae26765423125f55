"""Packing rows into windows."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtrain.export.calibration import check_windows, pack_windows
from qtrain.export.errors import ExportError


@given(
    rows=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), min_size=1, max_size=12),
    length=st.integers(1, 20),
    count=st.integers(1, 6),
    seed=st.integers(0, 5),
)
def test_windows_are_rows_end_to_end(rows: list[list[int]], length: int, count: int, seed: int) -> None:
    total = sum(map(len, rows))
    if total < length:
        with pytest.raises(ExportError, match="less than one window"):
            pack_windows(rows, length, count, seed=seed)
        return
    found = pack_windows(rows, length, count, seed=seed)
    assert found.windows.shape == (min(count, total // length), length)
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    end_to_end = [token for index in order for token in rows[index]]
    assert found.windows.flatten().tolist() == end_to_end[: found.windows.numel()]
    assert found.rows <= len(rows)
    assert pack_windows(rows, length, count, seed=seed).sha256 == found.sha256


def test_seed_decides_the_order() -> None:
    rows = [[n] * 4 for n in range(30)]
    assert pack_windows(rows, 8, 4, seed=0).sha256 != pack_windows(rows, 8, 4, seed=1).sha256


def test_too_few_rows_say_how_many_tokens_there_are() -> None:
    with pytest.raises(
        ExportError, match=r"the 2 rows of train\.jsonl hold 5 tokens.*window of 8.*--calib-data"
    ):
        pack_windows([[1, 2], [3, 4, 5]], 8, 4, source="train.jsonl")


def test_fewer_windows_than_asked_for_is_noted() -> None:
    found = pack_windows([[1] * 20], 8, 4)
    assert found.windows.shape[0] == 2
    assert "fills 2 windows of 8 tokens, not 4" in str(found.note())
    assert pack_windows([[1] * 80], 8, 10).note() is None


def test_windows_that_the_model_cannot_take() -> None:
    found = pack_windows([[1, 2, 3, 250]], 4, 1)
    check_windows(found, SimpleNamespace(max_position_embeddings=4, vocab_size=251))
    with pytest.raises(ExportError, match="max_position_embeddings is 3"):
        check_windows(found, SimpleNamespace(max_position_embeddings=3, vocab_size=251))
    with pytest.raises(ExportError, match="token id 250 is outside"):
        check_windows(found, SimpleNamespace(max_position_embeddings=4, vocab_size=250))
