"""What is said of a reading, and a server's life, with readers made up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qtrain.errors import UserError
from qtrain.export_command.readers import Reading, compare, missing, read_with
from qtrain.export_command.vllm_server import ServerFailed, reason, serving

VOCABULARY = 7


def logits(tokens: Tensor) -> Tensor:
    """Of a model whose next token is the last plus one; a second is almost as likely after 3."""
    found = torch.zeros(*tokens.shape, VOCABULARY)
    found.scatter_(2, ((tokens + 1) % VOCABULARY)[..., None], 4.0)
    return found + 3.99 * torch.nn.functional.one_hot((tokens == 3).long() * 6, VOCABULARY) * (
        tokens == 3
    ).unsqueeze(-1)


def reading(windows: list[list[int]], greedy: list[list[int]], shift: float = 0.0) -> Reading:
    tokens = torch.tensor(windows)
    found = logits(tokens)[:, :-1].log_softmax(-1)
    values, ids = found.topk(2)
    targets = found.gather(2, tokens[:, 1:, None])[..., 0]
    targets[0, 0] += shift
    return Reading("vllm", {}, 0.0, targets, ids, values, [[0]], torch.tensor(greedy))


def test_a_faithful_reader_has_no_difference() -> None:
    windows = [[0, 1, 2, 3], [4, 5, 0, 2]]
    found = compare(reading(windows, [[1, 2, 3, 4]]), windows, logits)
    assert found.positions == 6
    assert found.difference < 1e-6
    assert found.greedy_same == found.greedy_tokens == 4
    assert found.worst_margin == 0


def test_a_difference_and_a_near_tie_are_told_apart_from_a_wrong_token() -> None:
    windows = [[0, 1, 2, 3]]
    found = compare(reading(windows, [[1, 2, 3, 6]], shift=0.25), windows, logits)
    assert found.difference == pytest.approx(0.25, abs=1e-5)
    assert found.spread == pytest.approx(0.25 / 3, abs=1e-5)  # one of 3 targets and 6 likeliest
    assert found.greedy_same == 3
    assert found.worst_margin == pytest.approx(0.01, abs=1e-5)  # 6 is almost as likely as 4
    # after a wrong token the reference goes on from it
    wrong = compare(reading(windows, [[1, 5, 6, 0]]), windows, logits)
    assert wrong.greedy_same == 3
    assert wrong.worst_margin == pytest.approx(4, abs=1e-5)


def test_a_reader_that_is_not_there_is_an_error_with_its_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no reader 'onnx'; there are vllm, gptqmodel, transformers"):
        missing("onnx")
    expected = "reader transformers is not installed: python -m qtrain.bench.peers install gptqmodel"
    with pytest.raises(UserError, match=expected):
        read_with("transformers", tmp_path, [[0, 1]], [[0]], cache=tmp_path)


def test_the_reason_is_the_first_error_and_not_its_consequence() -> None:
    log = (
        "INFO 11-24 18:00:00 [api.py:1] starting\n"
        "(EngineCore pid=1) ERROR 11-24 18:00:01 [core.py:9] Traceback (most recent call last):\n"
        "(EngineCore pid=1) ERROR 11-24 18:00:01 [core.py:9] ValueError: group_size 48 is not supported\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert reason(log) == "ValueError: group_size 48 is not supported"
    assert reason("") == "it printed nothing"


def test_reason_of_pydantic_s_two_lines() -> None:
    log = (
        "(APIServer pid=7) WARNING 11-27 [utils.py:255] This can cause errors like `OSError: [Errno 24]`\n"
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for VllmConfig\n"
        "  Value error, Unsupported quantization config: bits=4, sym=False [type=value_error, input=1]\n"
    )
    assert reason(log) == "Value error, Unsupported quantization config: bits=4, sym=False"


SERVER = """#!{python}
import http.server, json, os, subprocess, sys
port = int(sys.argv[sys.argv.index("--port") + 1])
if "--fail" in sys.argv:
    sys.exit("ValueError: unknown quantization method")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open("pids", "w").write(json.dumps([os.getpid(), child.pid]))
class Answers(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def send(self, body, code=200):
        self.send_response(code); self.end_headers(); self.wfile.write(json.dumps(body).encode())
    def do_GET(self): self.send({{"version": "0.0"}})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked["prompt"] == [9]: return self.send({{"error": "no such token"}}, 400)
        place = {{"1": {{"logprob": -0.5}}, "2": {{"logprob": -1.0}}}}
        self.send({{"choices": [{{"prompt_logprobs": [None, place], "token_ids": [1, 2]}}]}})
http.server.HTTPServer(("127.0.0.1", port), Answers).serve_forever()
"""


def command(folder: Path) -> Path:
    path = folder / "vllm"
    path.write_text(SERVER.format(python=sys.executable))
    path.chmod(0o755)
    return path


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_a_server_answers_and_leaves_nothing_behind(tmp_path: Path) -> None:
    log, environment = tmp_path / "log", dict(os.environ)
    with serving(command(tmp_path), tmp_path, environment, log=log, options=(), timeout_s=30) as server:
        assert server.version() == "0.0"
        assert server.prompt_log_probs([0, 2], 1) == [{1: -0.5, 2: -1.0}]
        assert server.greedy([0], 2) == [1, 2]
        with pytest.raises(ServerFailed, match=r"vLLM answered 400: .*no such token"):
            server.complete([9])
        pids = json.loads((tmp_path / "pids").read_text())
        assert all(alive(pid) for pid in pids)
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


KILLED = """
import os, sys, time
from pathlib import Path
from qtrain.export_command.vllm_server import serving
command, folder = Path(sys.argv[1]), Path(sys.argv[2])
with serving(command, folder, dict(os.environ), log=folder / "log", options=(), timeout_s=30):
    print("up", flush=True)
    time.sleep(60)
"""


def test_a_server_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    words = [sys.executable, "-c", KILLED, str(command(tmp_path)), str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        pids = json.loads((tmp_path / "pids").read_text())
        assert all(alive(pid) for pid in pids)
        process.kill()
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


def test_a_server_that_refuses_says_why(tmp_path: Path) -> None:
    log, options = tmp_path / "log", ("--fail",)
    with (
        pytest.raises(ServerFailed, match="vLLM refused: ValueError: unknown quantization method"),
        serving(command(tmp_path), tmp_path, dict(os.environ), log=log, options=options, timeout_s=30),
    ):
        pass
