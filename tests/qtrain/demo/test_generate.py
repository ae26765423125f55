"""What is committed is what the generator writes; it is right, and nothing held out is trained on."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from qtrain.data.load import iter_rows
from qtrain.data.rows import Conversation, PreferencePair
from qtrain.demo import generate
from qtrain.demo.files import METHODS, SPLITS, demo_path
from qtrain.demo.words import LANGUAGES
from qtrain.errors import UserError
from qtrain.evaluation.checks import check_answer

FILES = list(product(METHODS, SPLITS, LANGUAGES))


def read(method: str, split: str, language: str) -> list[dict[str, Any]]:
    lines = demo_path(method, split, language).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def prompts(language: str, split: str) -> list[str]:
    sft = [f"{row['instruction']}\n\n{row['input']}" for row in read("sft", split, language)]
    return sft + [row["prompt"][0]["content"] for row in read("dpo", split, language)]


def ingredients(prompt: str) -> str:
    """What a prompt is made of: a report's cities, or a table's entries and columns, in no order."""
    body = prompt.split("\n\n", 1)[1]
    if body.startswith("{"):
        sales = next(value for value in json.loads(body).values() if isinstance(value, dict))
        return json.dumps(sorted(sales), ensure_ascii=False)
    header, _, *rows = (line.strip("| ").split(" | ") for line in body.splitlines())
    return json.dumps([header, sorted(row[0] for row in rows)], ensure_ascii=False)


def test_the_committed_files_are_what_the_generator_writes(tmp_path: Path) -> None:
    assert generate.main(["--out", str(tmp_path)]) == 0
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(written) == {demo_path(*file).name for file in FILES}
    for file in FILES:
        assert demo_path(*file).read_bytes() == written[demo_path(*file).name]
    assert sum(map(len, written.values())) < 1_500_000


def test_check_finds_a_stale_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--check"]) == 0
    generate.main(["--out", str(tmp_path)])
    (tmp_path / "sft-train-en.jsonl").write_bytes(b"{}\n")
    assert generate.main(["--check", "--out", str(tmp_path)]) == 1
    assert "sft-train-en.jsonl is not what the generator writes" in capsys.readouterr().err


def test_further_rows_are_held_out_too(tmp_path: Path) -> None:
    assert generate.main(["--further", "100", "--out", str(tmp_path)]) == 0
    for language in LANGUAGES:
        rows = [
            json.loads(line) for line in (tmp_path / f"sft-further-{language}.jsonl").read_text().splitlines()
        ]
        further = {ingredients(f"{row['instruction']}\n\n{row['input']}") for row in rows}
        assert len(rows) == 100
        assert all("check" in row for row in rows)
        for split in SPLITS:
            assert not further & {ingredients(prompt) for prompt in prompts(language, split)}


@pytest.mark.parametrize("words", [["--further", "0", "--out", "x"], ["--further", "5"]])
def test_further_rows_do_not_go_into_the_demos_folder(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        generate.main(words)


@pytest.mark.parametrize("language", LANGUAGES)
def test_nothing_held_out_is_trained_on(language: str) -> None:
    train, heldout = prompts(language, "train"), prompts(language, "heldout")
    assert len(set(heldout)) == len(heldout)
    assert not {ingredients(prompt) for prompt in train} & {ingredients(prompt) for prompt in heldout}


@pytest.mark.parametrize("language", LANGUAGES)
def test_held_out_references_pass_their_own_checks(language: str) -> None:
    rows = read("sft", "heldout", language)
    for row in rows:
        thought = f"<think>\n{row['reasoning']}\n</think>\n\n" if "reasoning" in row else ""
        assert check_answer(row["check"], thought + row["output"]).passed
    assert {row["check"]["kind"] for row in rows} == {"table_json", "sales_report"}
    assert {"reasoning" in row for row in rows if row["check"]["kind"] == "sales_report"} == {True, False}


@pytest.mark.parametrize("language", LANGUAGES)
def test_figures_follow_from_the_data(language: str) -> None:
    # an arithmetic of its own, from the JSON that the model is shown
    week, last, sales, total, growth = LANGUAGES[language].report_keys
    for row in read("sft", "heldout", language):
        if row["check"]["kind"] == "sales_report":
            data = json.loads(row["input"])
            assert row["check"]["week"] == data[week]
            assert row["check"]["total"] == sum(data[sales].values())
            assert row["check"]["top"] == sorted(data[sales], key=data[sales].get, reverse=True)[:3]
            given = data[growth] if growth in data else 100 * (row["check"]["total"] / data[last] - 1)
            assert row["check"]["growth"] == pytest.approx(given)
            assert data.get(total, row["check"]["total"]) == row["check"]["total"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_rejected_answers_are_wrong_and_chosen_ones_right(language: str) -> None:
    # The check of a pair is found by its prompt's task: drawn again, from the example's own generator.
    kinds = set()
    for pair in read("dpo", "train", language) + read("dpo", "heldout", language):
        chosen, rejected = pair["chosen"][0]["content"], pair["rejected"][0]["content"]
        check: dict[str, Any]
        if chosen.startswith("["):
            check = {"kind": "table_json", "expected": json.loads(chosen)}
        else:
            numbers = [line.rpartition(":" if language == "en" else "：")[2] for line in chosen.splitlines()]
            check = {
                "kind": "sales_report",
                "language": language,
                "week": int("".join(filter(str.isdigit, chosen.splitlines()[0]))),
                "total": int(numbers[1]),
                "growth": int(numbers[2].rstrip("%")),
                "top": numbers[3].strip().split(", " if language == "en" else "、"),
            }
        assert check_answer(check, chosen).passed
        result = check_answer(check, rejected)
        assert not result.passed
        kinds.add(result.reason.split(":")[0].split("[")[0])
    assert kinds >= {"not valid JSON", "$", "off the template", "total", "top"}


@pytest.mark.parametrize(("method", "split", "language"), FILES)
def test_qtrain_reads_every_row(method: str, split: str, language: str) -> None:
    rows = list(iter_rows(str(demo_path(method, split, language))))
    assert len(rows) == generate.COUNTS[f"{method}-{split}"]
    assert all(isinstance(row, Conversation if method == "sft" else PreferencePair) for row in rows)
    assert all(("check" in row.extra) == (method == "sft" and split == "heldout") for row in rows)


def test_an_unknown_file_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="split is 'test'; it is one of train, heldout"):
        demo_path("sft", "test")
