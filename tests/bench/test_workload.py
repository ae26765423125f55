"""The rows that every variant trains on."""

from __future__ import annotations

from pathlib import Path

import pytest

from qtrain.bench.workload import EOS, Workload, as_text, load_rows, make_rows, prepare

TINY = Workload(
    hidden_size=64, layers=1, intermediate_size=64, heads=2, kv_heads=1, vocab_size=300, length=12, prompt=4
)


def test_default_batch_is_the_documented_one() -> None:
    rows = make_rows(Workload())
    completions = [row[name] for row in rows for name in ("chosen_ids", "rejected_ids")]
    assert [len(row["prompt_ids"]) + len(row["chosen_ids"]) for row in rows] == [512, 512]
    assert sum(map(len, completions)) == 1528
    assert all(ids[-1] == EOS and EOS not in ids[:-1] for ids in completions)


def test_seed_decides_rows_and_folder() -> None:
    assert make_rows(TINY) == make_rows(TINY)
    other = Workload(seed=1)
    assert make_rows(other) != make_rows(Workload())
    assert other.fingerprint() != Workload().fingerprint()


@pytest.mark.filterwarnings("ignore")
def test_text_becomes_the_same_tokens(tmp_path: Path) -> None:
    """Libraries that tokenise pairs themselves get text; it must be the rows that the others get as ids."""
    from transformers import PreTrainedTokenizerFast

    folder = prepare(TINY, tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    for row in load_rows(folder):
        text = as_text(row["prompt_ids"]) + " " + as_text(row["chosen_ids"])
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == row["prompt_ids"] + row["chosen_ids"]
    assert prepare(TINY, tmp_path) == folder
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
