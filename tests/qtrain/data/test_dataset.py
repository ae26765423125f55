"""Files to token arrays: what is kept, counted, refused and left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qtrain.data.dataset import build_dataset
from qtrain.data.load import iter_rows
from qtrain.data.template import ChatEncoder, EncodedExample, EncodedPair
from qtrain.errors import DataError, UserError
from qtrain.recipe.schema import DataSettings

ROWS = [{"instruction": f"say {n}", "output": f"{n} " * (n + 1), "id": n} for n in range(5)]
PAIRS = [{"prompt": f"say {n}", "chosen": f"yes {n}", "rejected": "no"} for n in range(4)]


@pytest.fixture
def build(make_tokenizer):
    def make(*files, method="sft", limit=None, bad_rows_path=None, tokenizer=None, split="train", **settings):
        return build_dataset(
            DataSettings(**settings),
            tokenizer or make_tokenizer("chatml"),
            method=method,
            files=list(files),
            limit=limit,
            bad_rows_path=bad_rows_path,
            split=split,
        )

    return make


def test_rows_come_back_as_they_were_encoded(write, build, make_tokenizer):
    path = write("a.jsonl", ROWS)
    data = build(path)
    encoder = ChatEncoder(make_tokenizer("chatml"), max_length=2048)
    assert list(data) == [encoder.encode(row) for row in iter_rows(path)]
    assert isinstance(data[-1], EncodedExample)
    assert str(data[-1].source) == f"{path}:5"
    with pytest.raises(IndexError):
        data[len(data)]


def test_pairs_come_back_as_they_were_encoded(write, build, make_tokenizer):
    path = write("a.jsonl", PAIRS)
    data = build(path, method="dpo")
    encoder = ChatEncoder(make_tokenizer("chatml"), max_length=2048)
    assert list(data) == [encoder.encode_pair(row) for row in iter_rows(path)]
    assert isinstance(data[0], EncodedPair)
    assert data.report.tokens == sum(
        len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in data
    )


def test_the_report_counts_what_is_there(write, build):
    path = write("a.jsonl", ROWS)
    data = build(path)
    report = data.report
    lengths = sorted(len(example.input_ids) for example in data)
    assert (report.rows, report.examples, report.cut_rows, report.skipped_rows) == (5, 5, 0, 0)
    assert report.tokens == sum(lengths)
    assert report.supervised_tokens == sum(sum(example.supervised) for example in data)
    assert (report.length(0.5), report.length(1.0)) == (lengths[2], lengths[-1])
    text = "\n".join(report.lines())
    assert "alpaca: 'instruction' and 'output' are there" in text
    assert "other columns, not trained on: id" in text
    assert json.loads(json.dumps(report.as_dict()))["files"][0]["sha256"] == report.files[0].sha256
    cut = build(path, max_length=15).report
    assert cut.cut_rows == sum(length > 15 for length in lengths) > 0


def test_the_fingerprint_is_of_the_tokens(write, build):
    path, copy = write("a.jsonl", ROWS), write("b.jsonl", ROWS)
    assert build(path).fingerprint == build(copy).fingerprint
    changed = [*ROWS[:-1], {**ROWS[-1], "output": "other"}]
    different = [
        build(write("c.jsonl", changed)),
        build(path, limit=4),
        build(path, system="s"),
        build(path, copy),
    ]
    assert len({build(path).fingerprint, *(data.fingerprint for data in different)}) == 5


def test_files_are_joined_in_order_and_limit_counts_over_all(write, build):
    first, second = write("a.jsonl", ROWS), write("b.json", json.dumps(ROWS))
    assert [str(row.source).rpartition("/")[2] for row in build(first, second, limit=6)] == [
        *(f"a.jsonl:{line}" for line in range(1, 6)),
        "b.json:1",
    ]


def test_each_method_wants_its_own_rows(write, build):
    rows, pairs = write("a.jsonl", ROWS), write("b.jsonl", PAIRS)
    with pytest.raises(UserError, match=r"b\.jsonl: holds preference pairs .*--method dpo"):
        build(rows, pairs)
    with pytest.raises(UserError, match=r"a\.jsonl: holds conversations .*DPO needs"):
        build(rows, method="dpo")


def test_bad_rows_of_reading_and_of_encoding_are_told_together(write, build):
    rows = [
        ROWS[0],
        {"instruction": "x", "output": ""},
        {"instruction": "long " * 200, "output": "y"},
        ROWS[1],
        {},
    ]
    path = write("a.jsonl", rows)
    with pytest.raises(DataError, match="3 bad rows of 5") as caught:
        build(path, max_length=64)
    assert [problem.partition(": ")[0] for problem in caught.value.problems] == [
        f"{path}:{n}" for n in (2, 3, 5)
    ]
    assert "cut off altogether" in caught.value.problems[1]


def test_bad_rows_within_the_limit_are_not_lost(write, build):
    path = write("a.jsonl", [{"instruction": "x", "output": ""}, *ROWS])
    with pytest.raises(DataError, match=r"a\.jsonl:1: 'output' is empty"):
        build(path, limit=2)


def test_rows_left_out_are_counted_and_written_with_their_reason(write, build, tmp_path: Path):
    body = json.dumps(ROWS[0]).encode() + b'\n{"a": "\xff"}\n{"instruction": "x", "output": "\\ud83d"}\n'
    body += json.dumps({"instruction": "long " * 200, "output": "y"}).encode()
    path = write("a.jsonl", body)
    target = tmp_path / "run" / "bad_rows.jsonl"
    data = build(path, max_length=64, skip_bad_rows=True, bad_rows_path=target)
    assert (len(data), data.report.skipped_rows) == (1, 3)
    assert "3 bad ones left out" in "\n".join(data.report.lines())
    kept = [json.loads(line) for line in target.read_text().splitlines()]
    assert [entry["problem"].split(": ")[0] for entry in kept] == [f"{path}:{line}" for line in (2, 3, 4)]
    assert kept[0]["row"] == '{"a": "\\xff"}'
    assert kept[1]["row"]["output"] == "\ud83d"
    assert list(target.parent.iterdir()) == [target]


def test_no_file_of_bad_rows_where_there_are_none(write, build, tmp_path: Path):
    build(write("a.jsonl", ROWS), skip_bad_rows=True, bad_rows_path=tmp_path / "bad.jsonl")
    assert not (tmp_path / "bad.jsonl").exists()


def test_nothing_left_is_an_error(write, build):
    path = write("a.jsonl", [{"instruction": "x", "output": ""}])
    with pytest.raises(UserError, match="every row is bad"):
        build(path, skip_bad_rows=True)


def test_an_example_for_each_answer_is_reported(write, build, make_tokenizer):
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b")) * 2]
    data = build(write("a.jsonl", [{"messages": turns}]), tokenizer=make_tokenizer("qwen3"))
    assert (data.report.rows, len(data)) == (1, 2)
    assert "examples: 2" in "\n".join(data.report.lines())


def test_text_that_is_a_special_token_is_noted(write, build):
    data = build(write("a.jsonl", [{"instruction": "x", "output": "so <|im_end|> it goes"}]))
    assert any("<|im_end|>" in note and "a.jsonl:1" in note for note in data.report.notes)


def test_demo_means_the_files_that_ship_with_qtrain(build):
    data = build("demo", limit=3)
    assert data[0].source.file.endswith("sft-train-en.jsonl")
    assert build("demo", limit=3, split="heldout")[0].source.file.endswith("sft-heldout-en.jsonl")
    assert build("demo", limit=3, method="dpo")[0].source.file.endswith("dpo-train-en.jsonl")
