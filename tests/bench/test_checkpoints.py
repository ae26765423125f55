"""`qtrain bench checkpoints` on a tiny run: what its rows say, and what gets no speed."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qtrain.bench.checkpoint_rows import quality_row, serve_rows
from qtrain.bench.checkpoint_table import notes, tables
from qtrain.bench.launch import WorkerFailed
from qtrain.bench.peers.environments import Peer
from qtrain.bench.result_files import read_results
from qtrain.checkpoint_bench import serving
from qtrain.checkpoint_bench.candidates import find_candidates
from qtrain.checkpoint_bench.engines import Engine
from qtrain.checkpoint_bench.options import Options
from qtrain.checkpoint_bench.run import bench_checkpoints
from qtrain.checkpoint_bench.task import find_task
from qtrain.checkpoint_bench.vllm_load import descendants_pss, serve
from qtrain.checkpoint_bench.workload import Workload
from qtrain.cli import main
from qtrain.errors import UserError
from qtrain.export.verify import measure
from qtrain.export_command.merge import merged_weights
from qtrain.export_command.rows import held_out_windows
from qtrain.export_command.source import find_source
from tests.export.folders import save_model
from tests.qtrain.export_command.exports import SMALL, make_world

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4-bit run with its merged and GPTQ exports, none in AWQ."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    for words in (("merge",), ("gptq", *SMALL, "--gate", "off")):
        with pytest.raises(SystemExit) as ended:
            main(["export", words[0], str(folder / "run"), *words[1:]])
        assert ended.value.code in (0, None)
    return folder


def command(*words: object) -> int:
    """Exit code."""
    with pytest.raises(SystemExit) as ended:
        main(["bench", "checkpoints", *map(str, words)])
    return ended.value.code if isinstance(ended.value.code, int) else 0


SHORT = ("--quick", "--samples", "1", "--new-tokens", "2", "--limit", "2", "--threads", "1", "--gate", "off")


@pytest.mark.slow
def test_a_run_side_by_side(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)  # workers run elsewhere: names are relative to where the command is
    out, run = tmp_path / "found.json", Path("run")
    code = command(run, *SHORT, "--max-new-tokens", 4, "--cache", tmp_path, "--out", out)
    assert code == 0, capsys.readouterr().err
    results = read_results(out)
    quality = {row.variant: row for row in results.rows if row.op == "quality"}
    assert list(quality) == ["fp32 merged", "NF4 + adapter", "GPTQ 4-bit, group 32", "AWQ"]
    assert f"{quality['AWQ'].status}: {quality['AWQ'].reason}" == f"not exported: qtrain export awq {run}"
    assert quality["fp32 merged"].figures["KL"].p50 == 0
    assert quality["NF4 + adapter"].figures["KL"].p50 < 1e-9  # merged into what it was trained on, in fp32
    # the same bytes, read by the gate of the export
    source, gptq = find_source(str(run)), quality["GPTQ 4-bit, group 32"]
    windows = held_out_windows(source, [], 2, 128).ids
    expected = measure(
        merged_weights(source, "auto", "stored"), run / "export" / "gptq", windows, ends=None, bounds=None
    ).agreement
    assert math.isclose(gptq.figures["KL"].p50, expected.kl, rel_tol=1e-6)  # one sum, or one a window
    assert math.isclose(gptq.figures["perplexity"].p50, expected.perplexity_q, rel_tol=1e-6)
    assert expected.kl > 0
    # 4 bits, a 16-bit scale and a 4-bit zero point for 32 of them, and 32 bits of g_idx for each column
    assert 4 + 20 / 32 < gptq.figures["bits per weight"].p50 < 4 + 20 / 32 + 1
    serve = [row for row in results.rows if row.op == "serve"]
    transformers = [row for row in serve if "vLLM" not in row.variant]
    assert [row.status for row in transformers] == ["ok"] * 8
    assert {row.variant for row in transformers} == {
        "fp32 merged in transformers",
        "fp32 merged in transformers (again)",
        "NF4 + adapter in transformers (bitsandbytes)",
        "GPTQ 4-bit, group 32 in transformers (dequantised)",
    }
    assert {row.shape_text for row in serve} == {"batch 1", "batch 4"}
    for row in transformers:
        assert row.figures["memory"].p50 >= row.figures["memory loaded"].p50 > 1e8  # torch alone takes that
        assert row.figures["decode"].p50 > 0
    assert {row.reason for row in serve if row not in transformers} == {
        "python -m qtrain.bench.peers install vllm",
        "a base in NF4 with an adapter beside it is no one folder; its exports are",
    }
    again = [row for row in transformers if row.variant.endswith("(again)")]
    assert all(row.noise_floor is not None for row in again)


def result(nll: list[float], answers: list[list[int]] | None = None, step: float = 0.5) -> dict[str, Any]:
    """What an engine gives: two requests of three tokens, one second to the first."""
    return {
        "nll": nll,
        "answers": answers or [],
        "speed": [{"batch": 2, "prefill_s": [1.0], "steps_s": [[step, step]]}],
        "loaded_bytes": 100,
        "peak_bytes": 200,
        "versions": {},
        "facts": {},
    }


WORK = Workload([[1, 2, 3]], [], [], 0, (2,), 8, 2, 1, 60, 1, "cpu", 60, 0)


def served(name: str, outcome: dict[str, Any] | Exception) -> dict[str, Any]:
    """The sample of one process."""

    def run(_: Workload) -> dict[str, Any]:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    found = serving._one(Engine("engine", None, run), WORK, [2.0], None)
    return {"checkpoint": name, "engine": "engine", "again": False, "status": "ok"} | found


def test_speeds_are_of_the_times() -> None:
    """8 tokens each in a second, then two steps of half a second: by hand."""
    (row,) = serve_rows([served("a", result([2.0]))], [2], seed=0)
    figures = {name: its.get("runs", its) for name, its in row["figures"].items()}
    assert figures == {
        "memory loaded": [[100]],
        "memory": [[200]],
        "prefill": [[16.0]],
        "decode": [[4.0]],
        "TTFT": [[1.0, 1.0]],
        "TPOT": [[0.5, 0.5]],
        "throughput": [[3.0]],
    }
    (_, columns, (line,)), (_, _, (speed,)) = tables([row])
    assert len(line) == len(columns)
    assert speed[2:] == ["2", "16.0", "4.0", "3.0", "1000", "500"]


def test_streams_are_timed_by_their_tokens() -> None:
    """Sent at 0 and 0.5, first tokens at 1 and 2, last ones at 3 and 4."""
    sample = served("a", result([2.0]))
    sample["result"]["speed"] = [
        {"batch": 2, "prompt_tokens": 8, "streams": [[[0.0, 1.0, 3.0], [0.5, 2.0, 4.0]]]}
    ]
    (row,) = serve_rows([sample], [2], seed=0)
    assert row["figures"]["prefill"]["runs"] == [[16 / 2]]
    assert row["figures"]["decode"]["runs"] == [[2 / 3]]
    assert row["figures"]["TTFT"]["runs"] == [[1.0, 1.5]]
    assert row["figures"]["TPOT"]["runs"] == [[2.0, 2.0]]
    assert row["figures"]["throughput"]["runs"] == [[4 / 4]]


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (result([2.2]), "wrong: the engine's loss on window 1 is 2.200, the files' is 2.000"),
        (result([math.nan]), "wrong: the engine's loss on window 1 is nan"),
        (WorkerFailed("killed by SIGKILL (out of memory?)"), "out of memory: killed by SIGKILL"),
    ],
)
def test_an_engine_that_serves_something_else_gets_no_speed(
    outcome: dict[str, Any] | Exception, status: str
) -> None:
    samples = [served("a", outcome), served("a", result([2.0]))]  # a good process does not make up for it
    (row,) = serve_rows(samples, [2], seed=0)
    assert row["status"].startswith(status)
    assert row["figures"] == {}
    ((_, _, (line,)),) = tables([row])  # no table of speeds
    assert line[2:] == ["–"] * 3
    assert notes([row, row]) == [f"a in engine: {row['status']}"]


def test_a_checkpoint_that_answers_nothing_gets_no_speed(world: Path) -> None:
    task = find_task(find_source(str(world / "run")), [], 2, 4)
    assert task is not None
    assert len(task.prompts) == 2
    end = task.stop_ids[:1]
    engine = Engine("engine", None, lambda _: result([2.0], [end, []]))
    assert serving._one(engine, WORK, [2.0], task)["status"] == "wrong: it answers nothing to any prompt"
    words = task.tokenizer("total 20, growth 400")["input_ids"]
    found = task.score([[*words, *end], words])
    assert [row["passed"] for row in found["rows"]] == [True, False]
    assert found["rows"][1]["reason"] == f"did not stop within {len(words)} tokens"
    assert found["score"] == 0.5


def test_below_the_gate_nothing_is_started(
    world: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """KL is some 1e-3 here, and nothing for NF4, which was merged: that is served, as the reference is."""
    started = []

    def engines(candidate: Any, *_: Any) -> list[Engine]:
        def run(_: Workload) -> dict[str, Any]:
            started.append(candidate.name)
            raise WorkerFailed("not today")

        return [Engine("engine", None, run)]

    monkeypatch.setattr(serving, "engines_of", engines)
    options = Options(gate="kl=0.0000001", limit=0, rounds=1, rows=2, tokens=32)
    report = bench_checkpoints(str(world / "run"), options, lambda _: None)
    assert set(started) == {"fp32 merged", "NF4 + adapter"}
    rows = {row["variant"]: row for row in report["rows"] if row["op"] == "serve"}
    assert rows["GPTQ 4-bit, group 32 in engine"]["status"].startswith("not run: KL ")
    assert rows["fp32 merged in engine"]["status"] == "failed: not today"
    assert not any(row["figures"] for row in rows.values())
    quality = [row for row in report["rows"] if row["op"] == "quality"]
    assert quality[2]["status"].startswith("wrong: KL ")
    (_, columns, lines), _ = tables(report["rows"])
    assert {len(line) for line in lines} == {len(columns)}
    out = tmp_path / "found.json"
    out.write_text(json.dumps(report))
    assert len(read_results(out).rows) == len(report["rows"])


def test_candidates(world: Path, tmp_path: Path) -> None:
    source = find_source(str(world / "run"))
    own, other = (
        world / "run" / "export" / "gptq",
        shutil.copytree(world / "run" / "export" / "gptq", tmp_path / "again"),
    )
    names = [its.name for its in find_candidates(source, [own, other, other])]
    assert names[2:] == ["GPTQ 4-bit, group 32", "AWQ", "GPTQ 4-bit, group 32 (again)"]
    run = shutil.copytree(world / "run", tmp_path / "run")
    shutil.rmtree(run / "export" / "gptq")
    names = [its.name for its in find_candidates(find_source(str(run)), [other])]
    assert names == ["fp32 merged", "NF4 + adapter", "AWQ", "GPTQ 4-bit, group 32"]  # not GPTQ twice
    with pytest.raises(UserError, match="nothing-here is no folder; give the folder of an exported model"):
        find_candidates(source, [tmp_path / "nothing-here"])
    save_model(tmp_path / "third", vocab_size=400)
    with pytest.raises(UserError, match=r"is another model than .*: vocab_size is 400"):
        find_candidates(source, [tmp_path / "third"])


def test_a_damaged_export_is_a_row(world: Path, tmp_path: Path) -> None:
    run = shutil.copytree(world / "run", tmp_path / "run")
    weights = run / "export" / "gptq" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    damaged = find_candidates(find_source(str(run)), [])[2]
    assert damaged.name == "GPTQ"
    assert str(damaged.missing).startswith("failed: ")
    assert quality_row(damaged.name, str(damaged.missing), None)["figures"] == {}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--engine", "ollama"], "--engine ollama: there is transformers, vllm"),
        (["--device", "tpu"], "--device tpu: there is auto, cpu, cuda"),
        (["--device", "cuda"], "--device cuda: PyTorch finds no CUDA device here"),
        (["--out", "no/such/f.json"], "--out no/such/f.json: there is no folder no/such"),
        (["--gate", "kl=x"], "kl is 'x', must be a number of 0 or more"),
    ],
)
def test_refusals(words: list[str], line: str, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is one")
    assert command(world / "run", *words) == 2
    assert line in capsys.readouterr().err


# Stands for vLLM's command: serves its HTTP interface, each token 1 and of log-prob -1.5, ends after three.
FAKE = """
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

held = bytearray(50 << 20)

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"version": "9.9"}')

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()
        made = [1] * asked["max_tokens"]
        if asked.get("stream"):
            for token in made:
                event = {"choices": [{"text": "x", "token_ids": [token]}]}
                self.wfile.write(f"data: {json.dumps(event)}\\n\\n".encode())
            self.wfile.write(b'data: {"choices": []}\\n\\ndata: [DONE]\\n\\n')
            return
        choice = {"token_ids": made[:3], "finish_reason": "stop"}
        if "prompt_logprobs" in asked:
            places = [{str(token): {"logprob": -1.5}} for token in asked["prompt"]]
            choice["prompt_logprobs"] = [None, *places[1:]]
        self.wfile.write(json.dumps({"choices": [choice]}).encode())

    def log_message(self, *_):
        pass

assert sys.argv[1] == "serve" and "--max-num-seqs" in sys.argv
if sys.argv[sys.argv.index("--max-num-seqs") + 1] == "3":
    raise ValueError("three is too many")
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def fake_vllm(tmp_path: Path) -> Path:
    """A cache in which vLLM's environment is this one command."""
    peer = Peer("vllm", tmp_path)
    command = peer.folder / "bin" / "vllm"
    command.parent.mkdir(parents=True)
    command.write_text(f"#!{sys.executable}\n{FAKE}")
    command.chmod(0o755)
    pins = hashlib.sha256(peer.requirements.read_bytes()).hexdigest()
    (peer.folder / "installed.json").write_text(json.dumps({"requirements": pins}))
    return tmp_path


def test_vllm_is_a_process_under_load(fake_vllm: Path) -> None:
    work = replace(WORK, prompts=[[5, 6], [7]], stop_ids=[2], max_new_tokens=8, batches=(1, 2), samples=2)
    before = descendants_pss()
    found = serve(Path("folder"), work, fake_vllm)
    assert found["nll"] == [1.5]
    assert found["answers"] == [[1, 1, 1, 2]] * 2  # the end is put back
    assert found["versions"] == {"vllm": "9.9"}
    assert 50 << 20 < found["loaded_bytes"] - before < 120 << 20  # the array, an interpreter, its modules
    assert found["peak_bytes"] >= found["loaded_bytes"]
    one, two = found["speed"]
    assert [len(one["streams"]), len(two["streams"])] == [2, 2]  # behind one that warms up
    assert [len(requests) for requests in two["streams"]] == [2, 2]
    first, second = two["streams"][0]
    for times in (first, second):
        assert len(times) == 1 + work.new_tokens + 1
        assert times == sorted(times)
    assert first[0] < second[-1]
    assert second[0] < first[-1]  # both were under way together
    assert descendants_pss() <= before + (1 << 20)  # it has ended


def test_a_slow_engine_is_asked_less_often(fake_vllm: Path) -> None:
    work = replace(WORK, batches=(1,), samples=9, budget_s=0)
    assert len(serve(Path("folder"), work, fake_vllm)["speed"][0]["streams"]) == 3


def test_what_vllm_says_when_it_refuses(fake_vllm: Path) -> None:
    with pytest.raises(WorkerFailed, match=r"^vLLM refused: ValueError: three is too many$"):
        serve(Path("folder"), replace(WORK, batches=(1, 3)), fake_vllm)


def test_the_requests_are_the_same_for_every_engine_and_never_twice() -> None:
    work = Workload([list(range(100))], [], [], 0, (1, 4), 8, 2, 3, 60, 1, "cpu", 60, 0)
    drawn = [tuple(ids) for size in work.batches for one in work.requests(size) for ids in one]
    assert len(set(drawn)) == len(drawn) == 4 * 1 + 4 * 4
    assert work.as_job()["requests"] == [work.requests(1), work.requests(4)]


def test_memory_counts_processes_that_were_started() -> None:
    before = descendants_pss()
    code = "import sys; a = bytearray(50 << 20); print(1, flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        added = descendants_pss() - before
        child.communicate()
    assert 50 << 20 < added < 80 << 20  # the array, and an interpreter


def test_a_model_alone_has_no_rows(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(world / "base") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.endswith("is no run and has no rows; name a file with --data")


def test_noise_is_what_the_first_engine_is_from_itself() -> None:
    samples = [served("a", result([2.0], step=step)) for step in (0.5, 0.5)]
    samples += [served("a", result([2.0], step=0.4)) | {"again": True} for _ in range(2)]
    rows = serve_rows(samples, [2], seed=0)
    assert [row["variant"] for row in rows] == ["a in engine", "a in engine (again)"]
    # 4 tokens a second and 5: samples that do not vary leave an interval without width
    assert [row["noise_floor"] for row in rows] == [pytest.approx(0.2)] * 2
    assert notes(rows) == ["noise: decode at batch 2 differs by 20% from itself"]
