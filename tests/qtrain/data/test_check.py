"""`qtrain data check`: what it calls wrong, what it merely notes, and how it says so."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qtrain.cli.data import app
from qtrain.data.check import DataCheck
from qtrain.data.mixed_outputs import answer_kind
from qtrain.data.template import ChatEncoder
from qtrain.errors import UserError

ROW = {"instruction": "say hi", "output": "hi"}


def run(*arguments: str):
    result = CliRunner().invoke(app, ["check", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def found(path: str, encoder=None, max_length=2048) -> Counter[str]:
    seen: Counter[str] = Counter()
    check = DataCheck(max_length, encoder, lambda finding: seen.update([finding.kind]))
    check.check(path)
    return seen


def test_a_clean_file_is_fine(write):
    result = run(write("a.jsonl", [ROW, {"instruction": "say ho", "output": "ho"}]))
    assert result.exit_code == 0
    assert "nothing is wrong" in result.output
    assert "alpaca: 'instruction' and 'output' are there" in result.output


def test_every_bad_row_stands_on_a_line_of_its_own(write):
    path = write(
        "a.jsonl",
        [ROW, *({"instruction": f"{n}", "output": n} for n in range(50)), {"instruction": "x", "output": ""}],
    )
    result = run(path)
    lines = [line for line in result.output.splitlines() if line.startswith(f"{path}:")]
    assert result.exit_code == 1
    assert sum("'output' is a number and must be a string" in line for line in lines) == 50
    assert f"{path}:52: 'output' is empty" in lines
    assert "wrong: bad rows: 50; bad rows with an empty field: 1" in result.output


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        ([ROW, ROW], "duplicate"),
        ([ROW, {"instruction": "say hi", "response": "x"}], "mixed formats"),
        ([ROW, {"instruction": "x", "output": "  "}], "empty field"),
        ([{"text": "x"}], "bad row"),
        ([], "unreadable"),
    ],
)
def test_what_is_wrong(write, rows, kind):
    path = write("a.jsonl", rows)
    assert found(path)[kind] == 1
    assert run(path).exit_code == 1


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        ([ROW, {**ROW, "output": "hello"}], "same prompt"),
        (
            [
                {
                    "messages": [
                        {"role": "user", "content": "a"},
                        {"role": "assistant", "content": "b"},
                        {"role": "user", "content": "c"},
                    ]
                }
            ],
            "ends unanswered",
        ),
        ([{**ROW, "output": "x" * 5000}], "may be cut"),
        (
            [
                {"instruction": "a", "system": "s", "output": "[1]"},
                {"instruction": "b", "system": "s", "output": "x"},
            ],
            "mixed outputs by system",
        ),
    ],
)
def test_what_is_merely_noted(write, rows, kind):
    path = write("a.jsonl", rows)
    assert found(path) == Counter([kind])
    result = run(path)
    assert result.exit_code == 0
    assert "(noted)" in result.output


def test_duplicates_are_found_across_files(write):
    first, second = write("train.jsonl", [ROW]), write("heldout.json", json.dumps([ROW]))
    result = run(first, second)
    assert result.exit_code == 1
    assert f"{second}:1: the same row as {first}:1" in result.output


def test_json_and_free_text_under_one_instruction_is_wrong(write):
    rows = [{"instruction": "Give JSON.", "input": f"{n}", "output": f'{{"n": {n}}}'} for n in range(3)]
    rows += [{"instruction": "Give JSON.", "input": "9", "output": "Sure! It is nine."}]
    rows += [{"instruction": "Chat.", "input": f"{n}", "output": f"text {n}"} for n in range(3)]
    path = write("a.jsonl", rows)
    result = run(path)
    assert result.exit_code == 1
    assert (
        f"{path}:4: the instruction 'Give JSON.' is answered with JSON 3 x (line 1), free text 1 x (line 4)"
        in result.output
    )
    assert "Chat." not in result.output


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ('{"a": 1}', "JSON"),
        (" [1, 2]\n", "JSON"),
        ('{"a": 1', "broken JSON"),
        ('{"a": 1,}', "broken JSON"),
        ("3", "free text"),
        ("[Verse 1] la la [End]", "free text"),
        ("{x}", "free text"),
        ("", "free text"),
    ],
)
def test_the_kind_of_an_answer(answer, kind):
    assert answer_kind(answer) == kind


def test_lengths_are_counted_in_tokens_with_a_tokenizer(write, make_tokenizer):
    encoder = ChatEncoder(make_tokenizer("chatml"), max_length=64)
    rows = [ROW, {"instruction": "a", "output": "x y z " * 40}, {"instruction": "x y z " * 40, "output": "a"}]
    path = write("a.jsonl", rows)
    assert found(path, encoder, 64) == Counter({"cut": 1, "completion cut off": 1})


def test_the_command_counts_tokens_of_the_model_it_is_told(write, make_tokenizer, tmp_path: Path):
    make_tokenizer("chatml").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen2"}')
    path = write("a.jsonl", [ROW, {"instruction": "a", "output": "x y z " * 40}])
    result = run(path, "--model", str(tmp_path / "model"), "--max-length", "64")
    assert result.exit_code == 1
    assert "more than max_length 64" in result.output
    assert "tokens in the median row" in result.output
    assert run(path, "--model", str(tmp_path / "model")).exit_code == 0


def test_a_usage_error_is_none_of_the_file(write):
    with pytest.raises(UserError, match="no such file"):
        run(write("a.jsonl", [ROW]) + "x.jsonl")
    with pytest.raises(UserError, match="--format: 'alpacca' is not one of auto, alpaca"):
        run(write("a.jsonl", [ROW]), "--format", "alpacca")


def test_text_of_the_data_is_neither_markup_nor_long(write):
    rows = [
        {"instruction": "[bold]x[/bold]" * 1000, "output": "[1]"},
        {"instruction": "[bold]x[/bold]" * 1000, "output": "a"},
    ]
    rows.append({"[red]" * 1_000_000: 1})
    result = run(write("a.jsonl", rows))
    assert "[bold]x[/bold]" in result.output
    assert max(len(line) for line in result.output.splitlines()) < 1000


def test_a_pass_over_a_large_file_stays_small(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    count = 20_000
    with path.open("w") as file:
        for n in range(count):
            file.write(
                json.dumps({"instruction": f"{n:b} " + "q" * 600, "output": f"{n} " + "a" * 1400}) + "\n"
            )
    tracemalloc.start()
    assert found(str(path)) == Counter()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # two places and one group a row, each an entry of a dict with two small integers
    assert peak < count * 600
    assert peak < path.stat().st_size / 3
