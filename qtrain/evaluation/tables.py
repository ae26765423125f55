"""Results in the terminal: figures with intervals, then the rows that are worth a look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .checks import strip_thinking
from .figures import difference_text, interval_text, printable, short_source, shortened, value_text

SHOWN_ROWS = 3
WIDE = 100  # columns
_LINES = 6  # of an answer
_STYLES = {"better": "bold green", "worse": "bold red"}

Result = Mapping[str, Any]


def show_evaluation(result: Result, console: Console) -> None:
    """Figures of one subject and some of the rows that failed."""
    subject = result["subjects"][0]
    _heading(result, console)
    table = _figures(("measure", "value", "95 % interval", ""))
    for section in result["sections"]:
        line = section["lines"][0]
        table.add_row(
            section["title"],
            value_text(line["value"]["mean"], section["unit"]),
            interval_text(line["value"], section["unit"]),
            line["detail"],
        )
    console.print(table, highlight=False)
    console.print()
    for section in result["sections"]:
        console.print(_title(section))
    console.print()
    failed = [row for row in subject["rows"] if not row["passed"]]
    for row in failed[:SHOWN_ROWS]:
        console.print(_row_panel(short_source(row["source"]), row, [("answer", row)]))
    if len(failed) > SHOWN_ROWS:
        _dim(console, f"{len(failed)} rows failed, {SHOWN_ROWS} are shown; --json or --out has all of them")


def show_comparison(result: Result, console: Console) -> None:
    """Figures of all subjects, differences to the first, and some rows in which they disagree."""
    _heading(result, console)
    subjects = result["subjects"]
    for section in result["sections"]:
        console.print(_title(section))
        console.print(_section_table(section, subjects[0]["name"], console.width >= WIDE), highlight=False)
        console.print()
    numbers = result["disagreements"]
    for number in numbers[:SHOWN_ROWS]:
        answers = [(subject["name"], subject["rows"][number]) for subject in subjects]
        first = subjects[0]["rows"][number]
        console.print(_row_panel(short_source(first["source"]), first, answers))
    rows = len(subjects[0]["rows"])
    shown = f"; {SHOWN_ROWS} are shown, all are on the page" if len(numbers) > SHOWN_ROWS else ""
    console.print(f"they disagree in {len(numbers)} of {rows} rows{shown}", highlight=False)


def _section_table(section: Result, first: str, wide: bool) -> Table:
    """A subject's detail (perplexity, counts) has its own column where there is room, else its own line."""
    unit, detail = section["unit"], any(line["detail"] for line in section["lines"])
    names = ("", "value", "95 % interval", f"against {shortened(first, 20)}", "verdict")
    table = _figures((*names, "") if wide and detail else names)
    for line in section["lines"]:
        difference = "" if line["difference"] is None else difference_text(line["difference"], unit)
        word = line["verdict"] or ""
        name = Text(line["subject"])
        if detail and not wide:
            name.append(f"\n  {line['detail']}", style="dim")
        cells: list[Text | str] = [
            name,
            value_text(line["value"]["mean"], unit),
            interval_text(line["value"], unit),
            difference,
        ]
        more = [Text(line["detail"], "dim")] if wide and detail else []
        table.add_row(*cells, Text(word, _STYLES.get(word, "")), *more)
    return table


def _figures(names: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for place, name in enumerate(names):
        table.add_column(
            Text(name),
            justify="right" if place in (1, 2, 3) and name else "left",
            no_wrap=place != 0,
            overflow="fold" if place == 0 else "ellipsis",
        )
    return table


def _heading(result: Result, console: Console) -> None:
    console.print()
    for subject in result["subjects"]:
        tokens = sum(row["tokens"] for row in subject["rows"])
        running = sum(not row["stopped"] for row in subject["rows"])
        late = f", {running} did not stop within {subject['max_new_tokens']} tokens" if running else ""
        _dim(console, f"{subject['name']}: {len(subject['rows'])} answers, {tokens} tokens, greedy{late}")
    console.print()


def _title(section: Result) -> Text:
    return Text(section["title"], style="bold").append(f"  {section['explanation']}", style="dim not bold")


def _dim(console: Console, line: str) -> None:
    console.print(line, style="dim", highlight=False, markup=False)


def _row_panel(title: str, row: Result, answers: Sequence[tuple[str, Result]]) -> Panel:
    parts: list[Text] = [_block("prompt", _head(row["prompt"]), "bold")]
    parts.append(_block("reference", _head(row["reference"]), "bold"))
    for name, answer in answers:
        style = "green" if answer["passed"] else "red"
        outcome = "passed" if answer["passed"] else f"failed: {shortened(answer['reason'], 160)}"
        parts.append(_block(f"{name} {outcome}", _head(answer["answer"]), style))
    return Panel(Group(*parts), title=Text(title), title_align="left", border_style="dim")


def _block(title: str, body: str, style: str) -> Text:
    return Text(f"{printable(title)}\n", style=style).append(printable(body), style="default not bold")


def _head(text: str) -> str:
    """The first lines; of an answer with reasoning, those behind it."""
    answer = strip_thinking(text)
    before = ["<think> … </think>"] if answer.strip() and answer is not text else []
    lines = [
        shortened(line, 200) if len(line) > 200 else line
        for line in (answer or text).splitlines()
        if line.strip()
    ]
    kept = (
        lines if len(lines) <= _LINES else [*lines[: _LINES - 1], f"… {len(lines) - _LINES + 1} more lines"]
    )
    return "\n".join(before + kept)
