import html
import json
import re

import pytest
from rich.console import Console
from typer.testing import CliRunner

from qtrain.cli import app
from qtrain.evaluation.figures import difference_text, interval_text, value_text
from qtrain.evaluation.page import render_page
from qtrain.evaluation.tables import show_comparison, show_evaluation

LIMITS = ["--max-new-tokens", "24", "--batch-size", "5"]


@pytest.fixture(scope="module")
def compared(world):
    page = world / "compare.html"
    subjects = [world / "base", world / "runs" / "sft", world / "runs" / "dpo"]
    words = ["compare", *subjects, "--json", "--html", page, *LIMITS]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), page.read_text(encoding="utf-8")


def printed(show, result, width):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    show(result, console)
    return console.export_text()


def test_all_held_out_rows_of_all_runs(compared):
    result, _ = compared
    assert result["held_out"]["conversations"] == 14
    assert result["held_out"]["pairs"] == 10
    for subject in result["subjects"]:
        assert (len(subject["rows"]), len(subject["pairs"])) == (14, 10)


def test_each_subject_is_what_it_is_alone(world, compared):
    """Adapters come and go on one base: none may leave anything behind for the next."""
    result, _ = compared
    alone = {}
    for name in ("base", "runs/dpo"):
        words = [
            "eval",
            world / name,
            "--data",
            world / "rows.jsonl",
            "--data",
            world / "pairs.jsonl",
            "--json",
            *LIMITS,
        ]
        run = CliRunner().invoke(app, [str(word) for word in words])
        assert run.exit_code == 0, run.output
        alone[name] = json.loads(run.stdout)["subjects"][0]
    dpo = result["subjects"][2]
    assert [row["answer"] for row in dpo["rows"]] == [row["answer"] for row in alone["runs/dpo"]["rows"]]
    assert [pair["chosen"] for pair in dpo["pairs"]] == [
        pair["chosen"] for pair in alone["runs/dpo"]["pairs"]
    ]
    losses = [[round(row["nll"], 3) for row in subject["rows"]] for subject in result["subjects"]]
    assert losses[0] != losses[1] != losses[2] != losses[0]
    # alone, the base has no system message: like with like holds only beside the runs
    assert losses[0] != [round(row["nll"], 3) for row in alone["base"]["rows"]]
    assert any("like with like" in note for note in result["notes"])


def test_differences_are_to_the_first(compared):
    result, _ = compared
    for section in result["sections"]:
        first, *others = section["lines"]
        assert first["difference"] is None
        for line in others:
            gap = line["value"]["mean"] - first["value"]["mean"]
            assert line["difference"]["mean"] == pytest.approx(gap)
            assert line["difference"]["low"] <= gap <= line["difference"]["high"]
            assert line["verdict"] in ("better", "worse", "no difference", "too few rows")


def test_disagreements_are_the_rows_that_only_some_pass(compared):
    result, _ = compared
    passed = list(
        zip(*[[row["passed"] for row in subject["rows"]] for subject in result["subjects"]], strict=True)
    )
    assert result["disagreements"] == [n for n, row in enumerate(passed) if any(row) and not all(row)]
    assert result["disagreements"]


def test_page_shows_the_figures_of_the_json(compared):
    result, page = compared
    text = re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", page)))
    for section in result["sections"]:
        assert section["title"] in text
        for line in section["lines"]:
            value = value_text(line["value"]["mean"], section["unit"])
            assert f"{value} {interval_text(line['value'], section['unit'])}" in text
            if line["difference"]:
                assert f"{difference_text(line['difference'], section['unit'])} {line['verdict']}" in text
    assert f"({len(result['disagreements'])} of 14)" in text


def test_terminal_shows_the_figures_of_the_json(compared):
    result, _ = compared
    text = printed(show_comparison, result, 120)
    for section in result["sections"]:
        for line in section["lines"]:
            assert interval_text(line["value"], section["unit"]) in text
            if line["difference"]:
                assert difference_text(line["difference"], section["unit"]) in text


def test_page_escapes_what_models_and_data_say(compared):
    result, page = compared
    evil = '<script>alert("x")</script><img src=x onerror=alert(1)>'
    result = json.loads(json.dumps(result))
    number = result["disagreements"][0]
    result["subjects"][1]["name"] = evil
    result["subjects"][1]["rows"][number] |= {"answer": evil, "reason": evil}
    result["subjects"][0]["rows"][number] |= {"prompt": evil, "reference": evil, "source": evil, "kind": evil}
    result["notes"] = [evil]
    written = render_page(result)
    assert "<script" not in written
    assert "<img" not in written
    assert html.escape("Say <b>Berlin</b> 0 & stop.", quote=False) in page


def test_page_needs_no_network(compared):
    _, page = compared
    assert not re.search(r"(src|href)\s*=|url\(|@import|https?://", page)


@pytest.mark.parametrize("width", [80, 120])
def test_nothing_is_wider_than_the_terminal_and_no_figure_is_cut(compared, width):
    result, _ = compared
    names = {
        subject["name"]: name
        for subject, name in zip(result["subjects"], ("demo", "runs/demo-sft", "runs/demo-dpo"), strict=True)
    }
    text = json.dumps(result)
    for long, short in names.items():
        text = text.replace(long, short)
    result = json.loads(text)
    for show, value in (
        (show_comparison, result),
        (show_evaluation, result | {"subjects": result["subjects"][:1]}),
    ):
        shown = printed(show, value, width)
        assert max(map(len, shown.splitlines())) <= width
        assert "…" not in shown[: shown.index("╭")]  # above the rows
