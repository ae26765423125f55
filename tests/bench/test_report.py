"""`qtrain bench report`: the page's numbers are the JSON's, and a browser shows it without complaint."""

from __future__ import annotations

import json
import re
import shutil
import statistics
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qtrain.bench.report.axes import Axis, logarithmic, spread
from qtrain.bench.report.source import read_source, times
from qtrain.bench.report.text import digits, quantity
from qtrain.bench.result_files import read_results
from qtrain.cli import app
from tests.bench import result_samples as samples

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in BROWSERS if (found := shutil.which(name))), None)
MIB = 1 << 20
Cell = tuple[str, str | None]  # text, data-v


class Tables(HTMLParser):
    """Every table as rows of cells, and all text that a reader sees."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[Cell]]] = {}
        self.text = ""
        self._row: list[Cell] | None = None
        self._cell: str | None = None
        self._value: str | None = None
        self._name = ""
        self._silent = 0
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "table":
            self._name = given.get("id") or f"{given.get('class')} {len(self.tables)}"
            self.tables[self._name] = []
        elif tag == "tr":
            self._row = []
        elif tag in ("td", "th"):
            self._cell, self._value = "", given.get("data-v")
        elif tag in ("style", "script", "title"):
            self._silent += 1

    def handle_endtag(self, tag: str) -> None:
        if tag == "tr" and self._row is not None:
            self.tables[self._name].append(self._row)
        elif tag in ("td", "th") and self._row is not None and self._cell is not None:
            self._row.append((self._cell.strip(), self._value))
            self._cell = None
        elif tag in ("style", "script", "title"):
            self._silent -= 1

    def handle_data(self, data: str) -> None:
        if self._silent:
            return
        self.text += data
        if self._cell is not None:
            self._cell += data

    def rows(self) -> list[dict[str, Cell]]:
        """Of the table of all rows, by column."""
        head, *lines = self.tables["rows"]
        return [dict(zip([text for text, _ in head], line, strict=True)) for line in lines]


def make(folder: Path, reports: dict[str, Any], *options: str) -> Any:
    """The command's result; the page is `report.html` in the folder."""
    paths = [str(samples.save(report, folder / f"{name}.json")) for name, report in reports.items()]
    out = folder / "report.html"
    return CliRunner().invoke(app, ["bench", "report", *paths, "--out", str(out), *options])


def page(folder: Path, reports: dict[str, Any], *options: str) -> str:
    result = make(folder, reports, *options)
    assert result.exit_code == 0, result.output
    return (folder / "report.html").read_text()


def everything() -> dict[str, Any]:
    return {
        "kernels": samples.kernels(), "gpu": samples.kernels_on_a_gpu(), "train": samples.train(),
        "quantizers": samples.quantizers(), "checkpoints": samples.checkpoints(),
        "cards": samples.cards(),
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of every kind of result, with the curves of two runs."""
    folder = tmp_path_factory.mktemp("whole")
    names = []
    for name, extra in (("first", {}), ("second", {"rewards/margins": 0.5})):
        (folder / name).mkdir()
        steps = [{"step": step, "loss": 2.0 / step, "grad_norm": 1.0} | extra for step in range(1, 41)]
        (folder / name / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
        names += ["--runs", str(folder / name)]
    page(folder, everything(), *names)
    return folder / "report.html"


def test_the_table_holds_every_row_of_every_file(whole: Path) -> None:
    rows = Tables(whole.read_text()).rows()
    expected: list[tuple[str, str, float, float]] = []
    for name in ("kernels", "gpu"):
        report = everything()[name]
        expected += [
            (name, row["variant"], statistics.median(row["samples_s"]), float(row["peak_bytes"]))
            for row in report["rows"]
            if row["status"] == "ok"
        ]
    expected += [("train", "TRL (default)", 8.15, 2000.0 * MIB), ("train", "qtrain", 3.525, 300.0 * MIB)]
    expected += [("quantizers", "qtrain gptq", 41.5, 600.0 * MIB)]
    for file, variant, seconds, peak in expected:
        shown = [row for row in rows if (row["file"][0], row["variant"][0]) == (file, variant)]
        found = [(row["p50, ms"], float(row["memory, MiB"][1] or 0)) for row in shown]
        same = (text for (text, time), memory in found if memory == peak and _is(time, seconds))
        [text] = same
        assert float(text.replace("\u202f", "")) == pytest.approx(1e3 * seconds, rel=0.005)  # three digits
    counts = {"kernels": 4, "gpu": 9, "train": 3, "quantizers": 3, "checkpoints": 3, "cards": 3}
    assert {name: sum(row["file"][0] == name for row in rows) for name in counts} == counts


def _is(shown: str | None, value: float) -> bool:
    return shown is not None and float(shown) == pytest.approx(value)


def test_a_variant_that_failed_has_no_figures(whole: Path) -> None:
    parsed = Tables(whole.read_text())
    [row] = [row for row in parsed.rows() if row["variant"][0] == "liger-kernel"]
    assert row["status"][0] == "not installed: pip install liger-kernel"
    figures = {name for name, (_, value) in row.items() if value is not None}
    assert figures == {"ideal bytes, MB", "work, GFLOP"}  # of the case, whoever does it
    elsewhere = [line for name, table in parsed.tables.items() if name != "rows" for line in table]
    for line in elsewhere:
        if line[0][0] == "liger-kernel":
            assert [text for text, _ in line[1:]] == ["not installed"]


def test_the_summary_says_what_the_samples_say(whole: Path) -> None:
    parsed = Tables(whole.read_text())
    [summary] = [table for name, table in parsed.tables.items() if name.startswith("headline")]
    lines = {(line[0][0], line[2][0]): [text for text, _ in line] for line in summary[1:]}
    train = lines["DPO step, bf16", "TRL (default)"]
    assert train[3] == "3.52\u00a0s / 8.15\u00a0s" or train[3] == "3.53\u00a0s / 8.15\u00a0s"
    assert train[4].startswith(f"{8.15 / 3.525:.2f} [")
    assert train[5:] == [f"{2000 / 300:.1f}", "faster"]
    loss = lines["KL to 16 bits: 4-bit, group_size 64, symmetric", "GPTQModel GPTQ"]
    assert loss[3] == "0.1400 / 0.1900 nats"
    assert loss[4].startswith(f"{0.19 / 0.14:.2f} [1.3")
    assert loss[6] == "nearer"
    assert "qtrain is slower" not in parsed.text


def test_nothing_is_fetched_and_nothing_is_injected(tmp_path: Path) -> None:
    report = samples.kernels()
    report["rows"][2]["variant"] = "<script>alert('x')</script>"
    html = page(tmp_path, {"kernels": report})
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert" in html
    body = html.replace("</script>", "")
    assert not re.search(r"""https?:|\bsrc=|<link|@import|url\(|<iframe""", body)
    assert html.count("<script>") == 1


def test_what_no_file_holds_is_said(tmp_path: Path) -> None:
    text = Tables(page(tmp_path, {"quantizers": samples.quantizers()})).text
    assert "No file holds times" in text
    assert "No file holds kernels on a GPU" in text
    assert "No run was named" in text
    assert "Nothing here was timed on a GPU" in text
    text = Tables(page(tmp_path, {"gpu": samples.kernels_on_a_gpu()})).text
    assert "No file holds quantised checkpoints" in text
    assert "Nothing here was timed on a GPU" not in text
    assert "cases timed on the RTX 4090" in text


def test_curves_and_roofline_say_where_they_are_from(whole: Path) -> None:
    text = Tables(whole.read_text()).text
    assert "first: loss 2.00 at first, 0.0520 over the last tenth of 40 steps" in text
    assert "2 configurations of kernels on the RTX 4090, none of them timed" in text
    assert "so not in the plot: dequantize (1 in all), at 50% or more of the bandwidth" in text
    assert "0123456789abcdef, clean tree" in text


def test_checkpoints_of_one_run_stand_in_one_table(tmp_path: Path) -> None:
    """Each of its own format and size; a format that no engine here reads is a line without figures."""
    rows = [
        {"op": "merged", "variant": "v2", "dtype": "bf16", "figures": {"perplexity": 20.0, "size": 270e6}},
        {"op": "awq", "variant": "v2", "dtype": "int4", "figures": {"perplexity": 21.0, "decode": 80.0}},
        {"op": "gptq", "variant": "v2", "dtype": "int4 sym", "status": "not installed: no vLLM"},
    ]
    parsed = Tables(page(tmp_path, {"checkpoints": {"kind": "checkpoints", "rows": rows}}))
    [table] = [table for name, table in parsed.tables.items() if name.startswith("panel")]
    texts = [[text for text, _ in line] for line in table]
    assert texts[0][3:] == ["size", "decode"]
    assert texts[1] == ["v2, bf16", "", "20.0", "257\u00a0MiB", "–"]
    assert texts[2] == ["v2, int4", "", "21.0", "–", "80.0\u00a0tokens/s"]
    assert texts[3] == ["v2, int4 sym", "not installed"]


def test_a_run_may_stand_among_the_files(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    steps = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": 1.0}]
    lines = [json.dumps(step) for step in steps]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 4, "lo']))  # still being written
    files = [str(samples.save(samples.kernels(), tmp_path / "kernels.json")), str(run)]
    out = tmp_path / "report.html"
    result = CliRunner().invoke(app, ["bench", "report", *files, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "run: loss 3.00 at first, 1.00 over the last tenth of 2 steps" in Tables(out.read_text()).text
    assert "nan" not in out.read_text()


def test_the_committed_page_is_of_the_committed_results() -> None:
    """Each time on it is in its file: `qtrain bench report --out docs/benchmarks/report.html` makes it."""
    folder = Path(__file__).parents[2] / "docs" / "benchmarks"
    parsed = Tables((folder / "report.html").read_text())
    shown = parsed.rows()
    files = {path.stem: read_results(path) for path in folder.glob("*.json")}
    assert {row["file"][0] for row in shown} <= set(files)
    for name in {row["file"][0] for row in shown}:
        medians = [float(row["p50, ms"][1] or 0) for row in shown if row["file"][0] == name]
        expected = [time.p50 if (time := times(row)) is not None else 0 for row in files[name].rows]
        assert medians == pytest.approx(expected), name
    for run in read_source([folder], sorted((folder / "curves").iterdir())).runs:
        losses = [step["loss"] for step in run.steps if "loss" in step]
        said = rf"{run.name}: loss {losses[0]:.3g}\d* at first, .* of {len(losses)} steps"
        assert re.search(said, parsed.text), run.name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing.json"], "missing.json: can't be read"),
        (["."], "no *.json in it"),
        (["good.json", "--runs", "."], "no readable metrics.jsonl"),
        (["good.json", "--runs", "bad.jsonl"], "bad.jsonl:1: not JSON"),
        (["good.json", "--out", "no/such/report.html"], "--out no/such/report.html: can't be written"),
        (["good.json", "--png", "x.png"], "--png draws training steps in bf16, and no file holds any"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty" if arguments == ["."] else tmp_path)
    samples.save(samples.kernels(), tmp_path / "good.json")
    samples.save("{\n{}\n", tmp_path / "bad.jsonl")
    result = CliRunner().invoke(app, ["bench", "report", *arguments])
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_png_of_the_training_steps(tmp_path: Path) -> None:
    page(tmp_path, {"train": samples.train()}, "--png", str(tmp_path / "steps.png"))
    content = (tmp_path / "steps.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert int.from_bytes(content[16:20], "big") == 1800  # pixels across


def test_numbers_and_axes() -> None:
    assert [digits(v) for v in (0, 0.057312, 6.3241, 31.81, 2180.4)] == [
        "0",
        "0.0573",
        "6.32",
        "31.8",
        "2\u202f180",
    ]
    assert quantity(0.0157, "s") == "15.7\u00a0ms"
    assert quantity(286 * MIB, "bytes") == "286\u00a0MiB"
    assert Axis(0, 33).ticks(4) == [0, 10, 20, 30]
    axis = logarithmic([10, 1000], 1.0)
    assert axis.at(100) == pytest.approx(50)
    assert {10.0, 100.0, 1000.0} <= set(axis.ticks())
    moved = spread([50, 51, 52], 14, 6, 100)
    assert moved == pytest.approx([50, 64, 78])
    assert min(spread([98, 99, 99], 14, 6, 100)) == pytest.approx(72)


def browse(html: Path, profile: Path, *further: str) -> tuple[str, list[str]]:
    """(the document after its script ran, what the console was told)."""
    assert CHROMIUM is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    flags += [f"--user-data-dir={profile}", "--enable-logging=stderr", "--virtual-time-budget=2000"]
    command = [CHROMIUM, *flags, *further, "--dump-dom", html.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_a_browser_shows_it_and_sorts(whole: Path, tmp_path: Path) -> None:
    """The page with a click on `p50` and words in the filter appended; a script's error would be heard."""
    html = whole.read_text()
    click = """<script>
      [...document.querySelectorAll("#rows button")].find((b) => b.textContent.startsWith("p50")).click();
      const filter = document.getElementById("filter");
      filter.value = "qtrain gpu"; filter.dispatchEvent(new Event("input"));
    </script>"""
    clicked = samples.save(html.replace("</body>", f"{click}</body>"), tmp_path / "clicked.html")
    dom, told = browse(clicked, tmp_path / "profile")
    assert told == []
    parsed = Tables(dom)
    assert "6 of 25 rows" in parsed.text
    key = "p50, ms"
    values = [row[key][1] for row in parsed.rows()]
    numbers = [float(value) for value in values if value is not None]
    assert numbers == sorted(numbers)
    assert values[: len(numbers)] == [
        value for value in values if value is not None
    ]  # those without are last
    assert sorted(numbers) == sorted(
        float(row[key][1]) for row in Tables(html).rows() if row[key][1] is not None
    )
    broken = samples.save(
        html.replace("</body>", "<script>nothing.there();</script></body>"), tmp_path / "b.html"
    )
    assert len(browse(broken, tmp_path / "profile")[1]) == 1


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_it_fits_a_narrow_screen(whole: Path, tmp_path: Path) -> None:
    """At 400 px the page itself does not scroll sideways."""
    over = "document.documentElement.scrollWidth - innerWidth"
    script = f"<script>parent.postMessage(`${{innerWidth}} and ${{{over}}} more`, '*');</script></body>"
    inner = samples.save(whole.read_text().replace("</body>", script), tmp_path / "inner.html")
    frame = f'<iframe style="border:0;width:400px;height:900px" src="{inner.as_uri()}"></iframe>'
    listen = "<script>onmessage = (event) => { document.title = event.data; };</script>"
    outer = samples.save(f"<!doctype html><body>{listen}{frame}</body>", tmp_path / "outer.html")
    dom, _ = browse(outer, tmp_path / "profile", "--hide-scrollbars")
    assert "<title>400 and 0 more</title>" in dom
