"""README and docs hold what the committed JSON files hold."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from qtrain.bench import layer_model, quantizer_report, train_report
from qtrain.bench.statistics import ratio_of_medians
from qtrain.bench.table import figure, markdown_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "benchmarks"
README = (ROOT / "README.md").read_text()
BENCHMARKS = (ROOT / "docs" / "benchmarks.md").read_text()
KERNELS = (ROOT / "docs" / "kernels.md").read_text()
EXPERIMENTS = json.loads((ROOT / "docs" / "experiments.json").read_text())["entries"]
# launches of docs/kernels.md and what `qtrain bench cards` calls them
LOGPROB = {
    "`_statistics`": "statistics bf16 128x256x64",
    "the same, and P_j": "statistics and P bf16 128x256x64",
    "`_units`": "units",
    "`_accumulate`": "accumulate bf16 128x256x64",
    "`_logit_gradient`": "logit gradient bf16 128x256x64",
    "`_head_gradient`": "head gradient bf16 128x256x32",
}


def result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def lines_of(text: str, heading: str) -> list[list[str]]:
    """The cells of the tables behind a heading, line by line, without the first one's headings."""
    part = text.split(f"\n{heading}\n", 1)[1].split("\n#", 1)[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [cells(line) for line in lines[2:]]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|")]


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
    measured = {row["name"]: quantizer_report.cells(row) for row in rows}
    table = lines_of(README, "## Measured")[8:]
    assert len(table) == 7
    for name, *figures in table:
        assert figures == [measured[name][3], measured[name][6], measured[name][8]]


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


def test_checkpoints_table() -> None:
    found: dict[str, dict[str, dict[str, Any]]] = {"quality": {}, "serve": {}}
    for row in result("checkpoints")["rows"]:
        if row["status"] == "ok":
            found[row["op"]].setdefault(row.get("checkpoint", row["variant"]), row["figures"])
    names = ["bf16 merged", "bf16 (onto-original)", "GPTQ 4-bit, group 64", "AWQ 4-bit, group 64"]
    table = lines_of(BENCHMARKS, "## The checkpoints of a run")
    for name, (_, kl, score) in zip(names, table[:4], strict=True):
        value = found["quality"][name]["KL"]["value"]
        assert kl == (f"{value:.3f}" if value else "0")
        task = found["serve"][name]["task score"]
        low, high = task["interval"]
        assert score == f"{100 * task['value']:.0f} % [{100 * low:.0f}, {100 * high:.0f}]", name


def test_exports_on_the_task() -> None:
    sections = json.loads((ROOT / "docs" / "exports.json").read_text())["sections"]
    lines = next(its["lines"] for its in sections if its["title"] == "exact checks")
    table = lines_of(BENCHMARKS, "## The checkpoints of a run")[6:]
    for (_, score, difference, verdict), line in zip(table, lines, strict=True):
        assert score == f"{line['detail']}, {100 * line['value']['mean']:.1f} %"
        against = line["difference"]
        ends = [] if against is None else [100 * against[end] for end in ("mean", "low", "high")]
        assert difference == ("{:+.1f} [{:+.1f}, {:+.1f}]".format(*ends) if ends else "")
        assert verdict == (line["verdict"] or "")
        assert f"{100 * line['value']['mean']:.1f} %" in README
        assert difference in README


def test_export_memory_table() -> None:
    rows = result("gptq-memory")["rows"]
    expected = [
        [
            str(row["shape"]["layers"]),
            f"{row['figures']['memory'] / 2**20:.0f}",
            f"{row['figures']['memory'] / 1e9:.2f}",
            f"{row['figures']['CPU time']:.0f}",
        ]
        for row in rows
    ]
    assert lines_of(BENCHMARKS, "## Memory of an export at 7B") == expected
    assert all(row["figures"]["memory"] < 6e9 for row in rows)


def test_demo_in_the_readme() -> None:
    demo = json.loads((ROOT / "docs" / "demo.json").read_text())
    minutes, seconds = divmod(demo["make_demo"]["wall_s"], 60)
    assert f"It took {minutes} min {seconds} s" in README
    sections = {its["title"]: its for its in demo["sections"]}
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


def specimens() -> dict[str, dict[str, Any]]:
    return {its["specimen"]: its for its in result("cards")["cards"]}


def test_instructions_of_lora_linear() -> None:
    cards = specimens()
    table = lines_of(KERNELS, "### The decode")
    assert len(table) == 7
    for what, tile, registers, others in table:
        kernel, base, *more = [its.strip() for its in what.split(",")]
        decode = {"nested NF4": "nf4 nested", "NF4": "nf4", "16-bit": "16-bit"}[base]
        size = tile.split(",")[0].replace(" ", "")
        card = cards[" ".join(["lora_linear", kernel, decode, "bf16", size, "r=64", *more])]
        assert tile.split(",")[1:] == [f" {card['num_warps']} warps", f" {card['num_stages']} stages"]
        assert [registers, others] == [str(card["registers"]), f"{card['other_per_mma']:.2f}"], what


def test_instructions_of_linear_logprob() -> None:
    cards = specimens()
    table = {line[0].split(":")[0].split(" =")[0]: line[1:] for line in lines_of(KERNELS, "### In Triton")}
    assert table.keys() == LOGPROB.keys() | {"`_finish`"}
    for name, specimen in LOGPROB.items():
        card = cards[f"linear_logprob {specimen}"]
        others = "–" if card["other_per_mma"] is None else f"{card['other_per_mma']:.2f}"
        assert table[name][1] == str(card["registers"]), name
        assert table[name][2].split(" ")[0] == others, name


def test_modelled_layer(capsys: pytest.CaptureFixture[str]) -> None:
    layer_model.layer(markdown=True)
    assert capsys.readouterr().out.strip() in KERNELS


@pytest.mark.parametrize("entry", EXPERIMENTS, ids=lambda its: its["entry"])
def test_experiments(entry: dict[str, Any]) -> None:
    """Tables cell by cell; in the prose every figure with a decimal point."""
    text = (ROOT / "docs" / entry["document"]).read_text()
    part = re.split(r"\n##+ ", text.split(f"# {entry['entry']}\n", 1)[1])[0]
    tables = re.findall(r"(?:^\|.*\n)+", re.sub(r"\*\*|`", "", part) + "\n", flags=re.MULTILINE)
    shown = [[cells(line) for line in table.splitlines()] for table in tables]
    for table in entry["tables"]:
        assert [table["columns"], *table["rows"]] in [[head, *rows] for head, _, *rows in shown]
    assert entry["figures"] or entry["tables"]
    known = set(re.findall(r"\d+\.\d+", json.dumps(entry)))
    prose = "\n".join(line for line in part.splitlines() if not line.startswith("|"))
    found = re.findall(r"(?<![\w.])\d+\.\d+(?![\w.]*\d)", re.sub(r"`[^`]*`", "", prose))
    assert set(found) <= known


def test_every_experiment_of_the_lab_log() -> None:
    titles = re.findall(r"^## (.*)$", (ROOT / "docs" / "lab-log.md").read_text(), flags=re.MULTILINE)
    assert titles == [its["entry"] for its in EXPERIMENTS if its["document"] == "lab-log.md"]
