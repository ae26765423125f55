import json
import os

import pytest
from rich.console import Console
from typer.testing import CliRunner

from qtrain.cli.runs import runs as runs_command
from qtrain.errors import UserError
from qtrain.runs.listing import list_runs, show_runs, size_text, summarise

RECIPE = """
model: {name: Qwen/Qwen2.5-7B-Instruct, quantization: nf4}
training: {method: dpo}
parent: runs/first
"""


@pytest.fixture
def folder(tmp_path):
    make(tmp_path / "second", time="2026-01-02T00:00:00+00:00", recipe=RECIPE)
    make(tmp_path / "first", time="2026-01-01T00:00:00+00:00", recipe="model: {name: demo}\n", score=None)
    return tmp_path


def make(path, *, time, recipe, score=0.875):
    (path / "adapter").mkdir(parents=True)
    (path / "adapter" / "weights").write_bytes(b"x" * 3000)
    (path / "recipe.yaml").write_text(recipe)
    (path / "manifest.json").write_text(json.dumps({"time": time}))
    status = {"state": "finished", "step": 120, "final_loss": 0.12345, "eval_loss": 0.5}
    (path / "status.json").write_text(json.dumps(status))
    if score is not None:
        (path / "eval.json").write_text(json.dumps({"score": {"mean": score, "rows": 48}}))


def shown(folder, width):
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    show_runs(list_runs(folder), folder, console)
    return console.export_text()


def test_figures_of_a_run(folder):
    first, second = list_runs(folder)
    assert (first.name, second.name) == ("first", "second")  # by time, not by name or by making
    assert second.parent == "runs/first"
    assert (second.method, second.base, second.quantization) == ("dpo", "Qwen/Qwen2.5-7B-Instruct", "nf4")
    assert (second.state, second.steps, second.final_loss) == ("finished", 120, 0.12345)
    assert (second.eval_score, second.eval_rows, first.eval_score) == (0.875, 48, None)
    assert second.size == sum(
        path.stat().st_size for path in (folder / "second").rglob("*") if path.is_file()
    )


@pytest.mark.parametrize("width", [80, 100, 120])
def test_no_line_is_wider_than_the_terminal(folder, width):
    lines = shown(folder, width).splitlines()
    assert max(map(len, lines)) <= width
    assert "87.5%" in lines[2]
    assert "finished" in lines[2]
    assert ("from" in lines[0]) == (width >= 100)
    assert any("--json" in line for line in lines) == (width < 100)


def test_damaged_and_foreign_folders_are_named(folder):
    (folder / "photos").mkdir()
    (folder / "second" / "status.json").write_text('{"state": "fin')
    (folder / "first" / "recipe.yaml").write_text("model: [")
    (folder / "compare.html").write_text("<p>")
    problems = {run.name: run.problem for run in list_runs(folder)}
    assert set(problems) == {"first", "second", "photos"}
    assert "not valid YAML" in problems["first"]
    assert "status.json" in problems["second"]
    assert "no recipe.yaml" in problems["photos"]
    text = shown(folder, 200)
    assert all(name in text for name in problems)


@pytest.mark.parametrize("content", ["[]", "3", "{", '{"score": 7}', '{"score": {"mean": "high"}}'])
def test_odd_evaluations_do_no_harm(folder, content):
    (folder / "second" / "eval.json").write_text(content)
    run = summarise(folder / "second")
    assert run.eval_score is None
    assert (run.problem is not None) == (not content.startswith('{"'))


def test_unreadable_utf8_is_a_problem_not_a_crash(folder):
    (folder / "second" / "recipe.yaml").write_bytes(b"model: \xff\xfe")
    assert summarise(folder / "second").problem is not None


def test_errors_name_the_folder(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        list_runs(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        list_runs(tmp_path / "file")


def test_command_prints_json(folder):
    import typer

    app = typer.Typer()
    app.command()(runs_command)
    result = CliRunner().invoke(app, [str(folder), "--json"])
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert [run["name"] for run in found] == ["first", "second"]
    assert found[0]["time"] == "2026-01-01T00:00:00+00:00"


def test_empty_folder_says_what_to_do(tmp_path):
    assert "qtrain run" in shown(tmp_path, 80)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB")]
)
def test_size_text(size, text):
    assert size_text(size) == text
