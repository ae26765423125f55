"""`qtrain bench compare`: verdicts, rows that only one file has, refusals, exit codes."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qtrain.bench.report.page import render
from qtrain.bench.report.source import Source
from qtrain.bench.result_files import read_results
from qtrain.bench.results import ResultsError
from qtrain.cli import app
from tests.bench import result_samples as samples

Json = dict[str, Any]
KINDS: list[Callable[[], Json]] = [
    samples.kernels,
    samples.train,
    samples.checkpoints,
    samples.quantizers,
]


def run(folder: Path, a: Any, b: Any, *options: str) -> Any:
    """The result of comparing two reports, or texts."""
    paths = [str(samples.save(report, folder / name)) for report, name in ((a, "a.json"), (b, "b.json"))]
    return CliRunner().invoke(app, ["bench", "compare", *paths, *options])


def found(result: Any, variant: str, figure: str = "time") -> Json:
    """The row of a variant in the JSON that was printed."""
    rows = json.loads(result.stdout)["rows"]
    [row] = [row for row in rows if (row["variant"], row["figure"]) == (variant, figure)]
    return row


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_with_itself_has_no_difference(kind: Callable[[], Json], tmp_path: Path) -> None:
    result = run(tmp_path, kind(), kind(), "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert {row["verdict"] for row in report["rows"]} == {"no difference"}
    assert all(row["ratio"][1] == 1 for row in report["rows"])
    assert report["regressions"] == 0
    assert "0 worse, 0 better" in run(tmp_path, kind(), kind()).output


def slowed(report: Json, variant: str, factor: float) -> Json:
    """With one variant's times so many times as long."""
    changed = copy.deepcopy(report)
    for row in changed["rows"]:
        if row["variant"] == variant:
            row["samples_s"] = [factor * second for second in row["samples_s"]]
    return changed


@pytest.mark.parametrize(
    ("factor", "verdict", "exit_code"),
    [(1.5, "slower", 1), (0.6, "faster", 0), (1.02, "no difference", 0)],
)
def test_a_verdict_needs_more_than_the_noise(
    factor: float, verdict: str, exit_code: int, tmp_path: Path
) -> None:
    result = run(tmp_path, samples.kernels(), slowed(samples.kernels(), "qtrain", factor), "--json")
    assert result.exit_code == exit_code, result.output
    row = found(result, "qtrain")
    low, estimate, high = row["ratio"]
    assert low <= estimate <= high
    assert estimate == pytest.approx(factor)
    assert row["verdict"] == verdict
    assert row["noise_measured"]
    assert found(result, "peft")["verdict"] == "no difference"
    assert verdict in run(tmp_path, samples.kernels(), slowed(samples.kernels(), "qtrain", factor)).output


def test_the_noise_floor_is_that_of_the_worse_file(tmp_path: Path) -> None:
    """One that was 40 % in one of the files hides a change by a fifth."""
    quiet, loud = samples.kernels(), samples.kernels()
    for row in loud["rows"]:
        row["noise_floor"] = 0.4
    changed = slowed(quiet, "peft", 1.2)
    assert found(run(tmp_path, quiet, changed, "--json"), "peft")["verdict"] == "slower"
    for a, b in ((loud, changed), (changed, loud)):
        row = found(run(tmp_path, a, b, "--json"), "peft")
        assert row["noise_floor"] == 0.4
        assert row["verdict"] == "no difference"


def test_the_noise_floor_is_measured_where_none_is_stated(tmp_path: Path) -> None:
    """The second run of the variant takes 1.2 times as long: no figure of A is surer than that."""
    first, changed = slowed(samples.kernels(), "qtrain (again)", 1.2), slowed(samples.kernels(), "peft", 1.15)
    for report in (first, changed):
        for row in report["rows"]:
            del row["noise_floor"]
    row = found(run(tmp_path, first, changed, "--json"), "peft")
    assert 0.15 < row["noise_floor"] < 0.25
    assert row["verdict"] == "no difference"
    assert found(run(tmp_path, changed, first, "--json"), "peft")["verdict"] == "faster"


def test_memory_that_grew_is_a_regression(tmp_path: Path) -> None:
    changed = samples.kernels()
    changed["rows"][0]["peak_bytes"] = 150 << 20
    result = run(tmp_path, samples.kernels(), changed, "--json")
    assert result.exit_code == 1
    assert found(result, "qtrain", "memory")["verdict"] == "worse"
    assert run(tmp_path, samples.kernels(), changed, "--figure", "time").exit_code == 0


def test_resident_memory_has_a_grain_and_cuda_has_none(tmp_path: Path) -> None:
    """3 MiB of 20 are a seventh: noise of a process that grew, and a regression of an allocator's count."""
    for device, verdict in (("cpu", "no difference"), ("cuda", "worse")):
        a, b = samples.kernels(), samples.kernels()
        for report, peak in ((a, 20), (b, 23)):
            report["protocol"]["device"] = device
            for row in report["rows"][:2]:
                row["peak_bytes"] = peak << 20
        assert found(run(tmp_path, a, b, "--json"), "qtrain", "memory")["verdict"] == verdict


def test_drift_of_the_machine_is_named_and_can_be_allowed(tmp_path: Path) -> None:
    """All times are 1.2 times as long, of code that is not ours too."""
    first = samples.kernels()
    first["rows"] += [samples.kernel_row(name, samples.QUIET) for name in ("eager", "unsloth")]
    later = copy.deepcopy(first)
    for row in later["rows"]:
        row["samples_s"] = [1.2 * second for second in row.get("samples_s", ())] or None
    result = run(tmp_path, first, later)
    assert result.exit_code == 1
    assert "are 1.20 times A's in the median: the machine was not the same" in result.output
    assert run(tmp_path, first, later, "--allow-drift").exit_code == 0
    row = found(run(tmp_path, first, later, "--allow-drift", "--json"), "qtrain")
    assert row["noise_floor"] == pytest.approx(0.03 + 0.2)


def test_quality_is_better_or_worse(tmp_path: Path) -> None:
    changed = samples.checkpoints()
    changed["rows"][0]["figures"] |= {"KL": 0.17, "perplexity": 19.0}
    result = run(tmp_path, samples.checkpoints(), changed, "--json")
    assert result.exit_code == 1
    assert found(result, "qtrain", "KL")["verdict"] == "worse"
    assert found(result, "qtrain", "perplexity")["verdict"] == "better"


def test_training_counts_the_reference_pass(tmp_path: Path) -> None:
    """A step of 2.025 s after a reference pass of 1.5 s; the first step of each process warms up."""
    result = run(tmp_path, samples.train(), samples.train(), "--json")
    assert found(result, "qtrain")["a"] == {"n": 4, "p05": 3.4575, "p50": 3.525, "p95": pytest.approx(3.5925)}
    assert found(result, "TRL (default)")["a"]["p50"] == pytest.approx(8.15)
    assert found(result, "qtrain", "memory")["a"]["p50"] == 300 << 20


def test_rows_of_one_file_are_listed(tmp_path: Path) -> None:
    less, more = samples.kernels(), samples.kernels()
    less["rows"] = less["rows"][:2]
    more["rows"].append(samples.kernel_row("qtrain", samples.QUIET, rows=2048))
    result = run(tmp_path, less, more, "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0
    assert report["only_in_a"] == []
    assert [row["variant"] for row in report["only_in_b"]] == ["peft", "liger-kernel", "qtrain"]
    text = run(tmp_path, more, less).output
    assert "only in A: qtrain, lora_linear 0.5B, down, nf4, M 2048, N 896, K 4864 bf16 forward" in text


def test_a_variant_that_breaks_is_a_regression(tmp_path: Path) -> None:
    broken = samples.kernels()
    broken["rows"][0] = samples.kernel_row("qtrain", [], status="wrong: y0 is off by 0.4")
    result = run(tmp_path, samples.kernels(), broken)
    assert result.exit_code == 1
    assert "qtrain, lora_linear 0.5B" in result.output
    assert "A ok, B wrong: y0 is off by 0.4 (broke)" in result.output
    gone = samples.kernels()
    gone["rows"][2] = samples.kernel_row("peft", [], status="not installed: pip install peft")
    assert run(tmp_path, samples.kernels(), gone).exit_code == 0


def changed_at(report: Json, place: str, value: Any) -> Json:
    *parts, last = place.split(".")
    inner = report
    for part in parts:
        inner = inner[part]
    inner[last] = value
    return report


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        (samples.kernels(), changed_at(samples.kernels(), "provenance.machine.cpu", "B"), "CPU (Some CPU"),
        (samples.kernels(), changed_at(samples.kernels(), "protocol.device", "cuda"), "device (cpu, cuda)"),
        (samples.kernels(), changed_at(samples.kernels(), "provenance.machine.threads", 8), "threads (2, 8)"),
        (samples.train(), changed_at(samples.train(), "protocol.threads", 4), "threads (2, 4)"),
        (samples.train(), changed_at(samples.train(), "workload.layers", 8), "layers (4, 8)"),
    ],
)  # fmt: skip
def test_other_machines_are_refused_unless_forced(a: Json, b: Json, said: str, tmp_path: Path) -> None:
    result = run(tmp_path, a, b)
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""
    forced = run(tmp_path, a, b, "--force")
    assert forced.exit_code == 0, forced.output
    assert f"compared although they differ in {said}" in forced.output


def without(report: Json, *places: str) -> Json:
    for place in places:
        del report[place]
    return report


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a.json:1: not JSON"),
        ("{", "a.json:1: not JSON"),
        ("[" * 100_000, "nested too deep"),
        ("[1, 2]", "not a benchmark's result: JSON of a list"),
        ('{"loss": 1.0}', "not a benchmark's result: it has no 'kind'"),
        ('{"kind": "kernels"}', "no list 'rows'"),
        ('{"kind": "kernels", "rows": []}', "it has no rows"),
        ('{"kind": "kernels", "rows": [3]}', "rows[0]:"),
        ('{"kind": "kernels", "rows": [{"op": "x"}]}', "rows[0]: model: Field required"),
        (
            '{"kind": "kernels", "rows": [], "provenance": 3}',
            "provenance: Input should be a valid dictionary",
        ),
        (
            '{"kind": "new", "rows": [{"op": "x", "variant": "y", "figures": {"KL": {}}}]}',
            "has no value",
        ),
        ('{"kind": "new", "rows": [{"variant": "y"}, {"variant": "y"}]}', "two rows of 'y'"),
        (
            json.dumps(changed_at(samples.kernels(), "rows", [samples.kernel_row("a", [1, -1])])),
            "samples_s.1",
        ),
        (json.dumps(samples.kernels()).replace("1.01", "NaN", 1), "finite"),
        (json.dumps(without(samples.train(), "samples")), "no list 'samples'"),
    ],
)
def test_what_is_no_result_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    result = run(tmp_path, text, samples.kernels())
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


def places(value: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of everything inside."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in inside for place in ((*before, key), *places(inner, (*before, key)))]


@pytest.mark.parametrize("kind", [*KINDS, samples.cards, samples.kernels_on_a_gpu])
def test_a_damaged_file_is_read_or_refused(kind: Callable[[], Json], tmp_path: Path) -> None:
    """One value replaced by something else, anywhere: a result, or one line that says what is wrong."""
    draw = random.Random(0)
    report = kind()
    for place in draw.sample(places(report), 40):
        damaged = copy.deepcopy(report)
        inner = damaged
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = draw.choice([None, "x", -1, [], {}, True, 1e300])
        path = samples.save(damaged, tmp_path / "damaged.json")
        refused = ""
        try:
            render(Source((read_results(path),)))
        except ResultsError as error:
            refused = str(error)
        assert "\n" not in refused, place


def test_files_that_do_not_open(tmp_path: Path) -> None:
    good = str(samples.save(samples.kernels(), tmp_path / "good.json"))
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    for bad, said in (
        ("missing.json", "can't be read: No such file"),
        (".", "Is a directory"),
        ("binary.json", "UTF-8"),
    ):
        result = CliRunner().invoke(app, ["bench", "compare", good, str(tmp_path / bad)])
        assert result.exit_code == 2
        assert said in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_other_benchmarks_are_refused(tmp_path: Path) -> None:
    result = run(tmp_path, samples.kernels(), samples.train(), "--force")
    assert result.exit_code == 2
    assert "holds kernels" in result.stderr
    other = samples.kernels()
    for row in other["rows"]:
        row["model"] = "7B"
    result = run(tmp_path, samples.kernels(), other)
    assert result.exit_code == 2
    assert "have no row in common" in result.stderr
    result = run(tmp_path, samples.kernels(), samples.kernels(), "--figure", "speed")
    assert result.exit_code == 2
    assert "--figure speed: the rows of" in result.stderr


def test_plain_fields_of_a_new_benchmark_are_figures(tmp_path: Path) -> None:
    row = {"name": "GPTQModel", "method": "gptq", "bits": 4, "group_size": 64, "kl": 0.19, "peak_mib": 900,
           "wall_s": 12.5, "note": "default"}  # fmt: skip
    report = {"kind": "new", "rows": [row, row | {"group_size": 32, "kl": 0.1}]}
    first, second = read_results(samples.save(report, tmp_path / "q.json")).rows
    assert (first.variant, first.op) == ("GPTQModel", "gptq")
    assert {name: (one.p50, one.unit, one.better) for name, one in first.figures.items()} == {
        "KL": (0.19, "nats", "less"),
        "memory": (900 << 20, "bytes", "less"),
        "wall time": (12.5, "s", "less"),
    }
    assert first.key != second.key


def test_the_committed_results_are_read() -> None:
    folder = Path(__file__).parents[2] / "docs" / "benchmarks"
    files = sorted(folder.glob("*.json"))
    assert files
    for path in files:
        assert all(row.figures or row.status != "ok" for row in read_results(path).rows), path
