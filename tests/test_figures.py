"""The tables of README and docs/benchmarks.md hold what the committed JSON files hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qtrain.bench import quantizer_report, train_report
from qtrain.bench.statistics import ratio_of_medians
from qtrain.bench.table import figure, markdown_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "benchmarks"
README = (ROOT / "README.md").read_text()
BENCHMARKS = (ROOT / "docs" / "benchmarks.md").read_text()


def result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def lines_of(text: str, heading: str) -> list[list[str]]:
    """The cells of the tables behind a heading, line by line, without the first one's headings."""
    part = text.split(f"\n{heading}\n", 1)[1].split("\n#", 1)[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("task", ["dpo", "sft"])
def test_training_table(task: str) -> None:
    rows = [row for row in result("train")["rows"] if row["task"] == task]
    assert markdown_table(train_report.COLUMNS, [train_report.cells(row) for row in rows]) in BENCHMARKS


def test_training_in_the_readme() -> None:
    rows = {(row["task"], row["name"]): row for row in result("train")["rows"]}
    table = lines_of(README, "## Measured")[:6]
    for task, name, cpu, memory in table:
        row = rows[task.lower(), name]
        assert [cpu, memory] == [figure(row["epoch_cpu_s_p50"], 1), figure(row["added_mib_p50"], 0)]


def test_exports_in_the_readme() -> None:
    rows = [row for row in result("quantizers")["rows"] if row["group_size"] == 64]
    cells = {row["name"]: quantizer_report.cells(row) for row in rows}
    table = lines_of(README, "## Measured")[8:]
    assert len(table) == 7
    for name, *figures in table:
        assert figures == [cells[name][3], cells[name][6], cells[name][8]]


def test_ops_table() -> None:
    cases: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in result("kernels")["rows"]:
        if row["pass"] == "forward+backward" and row["status"] == "ok":
            case = (row["op"], row["part"], row["base"], str(row["rows"]))
            cases.setdefault(case, {})[row["variant"].removesuffix(" + bitsandbytes")] = row
    table = lines_of(BENCHMARKS, "## The ops on a CPU")
    assert len(table) == len(cases)
    for op, part, base, rows, *figures in table:
        found = cases[op, part, base, rows]
        ours, *others = (found.get(name) for name in ("qtrain", "eager PyTorch", "torch.compile", "peft"))
        ratios = [_ratio(other, ours) for other in others]
        memory = [_mib(ours), _mib(others[0]), _mib(others[2])]
        assert figures == [*ratios, *memory], (op, part, base, rows)


def _ratio(other: dict[str, Any] | None, ours: Any) -> str:
    if other is None:
        return "–"
    return f"{ratio_of_medians([other['samples_s']], [ours['samples_s']]).estimate:.2f}"


def _mib(row: dict[str, Any] | None) -> str:
    return "–" if row is None else f"{row['peak_bytes'] / 2**20:.0f}"


def test_demo_in_the_readme() -> None:
    sections = {
        its["title"]: its for its in json.loads((ROOT / "docs" / "demo.json").read_text())["sections"]
    }
    for title in ("exact checks", "preference accuracy"):
        for line in sections[title]["lines"]:
            low, high = (100 * line["value"][end] for end in ("low", "high"))
            value = f"{100 * line['value']['mean']:.1f}%"
            found = [
                its
                for its in README.splitlines()
                if its.startswith(f"    {line['subject']} ") and value in its
            ]
            assert any(f"[{low:.1f}, {high:.1f}]" in its for its in found), line
