"""vLLM's OpenAI server on 127.0.0.1, for as long as a `with` block, and what it says of token windows."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtrain.errors import QtrainError

NAME = "model"  # under which the folder is served
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # 127.0.0.1 through no proxy
# what errors say that follow from one which stands elsewhere
CONSEQUENCES = ("Engine core init", "EngineCore failed", "validation error for")
WATCH = 'read _; kill -KILL "-$0" 2> /dev/null'  # its input ends with the process that holds the other end


class ServerFailed(QtrainError):
    """vLLM did not start, refused a folder or a request, or died; one line."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server that answers.

    Attributes:
        url: without a path.
        timeout_s: of one request.
    """

    url: str
    timeout_s: float

    def version(self) -> str:
        """vLLM's."""
        return str(self._get("/version")["version"])

    def prompt_log_probs(self, window: Sequence[int], top: int) -> list[dict[int, float]]:
        """Behind each token but the last: the `top` likeliest next ones and the window's own, log-probs."""
        answer = self.complete(window, max_tokens=1, prompt_logprobs=top)
        given = answer["prompt_logprobs"][1:]  # nothing is before the first
        return [{int(token): float(found["logprob"]) for token, found in place.items()} for place in given]

    def greedy(self, prompt: Sequence[int], new_tokens: int) -> list[int]:
        """The likeliest tokens after `prompt`, one after the other, through any end of the text."""
        answer = self.complete(prompt, max_tokens=new_tokens, ignore_eos=True, return_token_ids=True)
        return [int(token) for token in answer["token_ids"]]

    def complete(self, prompt: Sequence[int] | str, **options: Any) -> dict[str, Any]:
        """`/v1/completions` at temperature 0; the first choice.

        Raises:
            ServerFailed: with the server's reason.
        """
        prompt = prompt if isinstance(prompt, str) else list(prompt)
        body = {"model": NAME, "prompt": prompt, "temperature": 0} | options
        choice: dict[str, Any] = self._ask("/v1/completions", body)["choices"][0]
        return choice

    def chat(self, messages: Sequence[dict[str, str]], **options: Any) -> str:
        """`/v1/chat/completions` at temperature 0, through the folder's chat template; the answer's text.

        Raises:
            ServerFailed: with the server's reason.
        """
        body = {"model": NAME, "messages": list(messages), "temperature": 0} | options
        return str(self._ask("/v1/chat/completions", body)["choices"][0]["message"]["content"])

    def healthy(self) -> bool:
        """Whether it answers at all."""
        try:
            with OPENER.open(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:  # URLError among them: not there yet
            return False

    def _get(self, path: str) -> Any:
        return self._open(urllib.request.Request(self.url + path))

    def _ask(self, path: str, body: dict[str, Any]) -> Any:
        data = json.dumps(body).encode()
        return self._open(urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}))

    def _open(self, request: urllib.request.Request) -> Any:
        try:
            with OPENER.open(request, timeout=self.timeout_s) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
            raise ServerFailed(f"vLLM answered {error.code}: {said[:300]}") from None
        except OSError as error:
            raise ServerFailed(f"vLLM gave no answer: {error}") from None


@contextmanager
def serving(
    command: Path,
    folder: Path,
    environment: dict[str, str],
    *,
    log: Path,
    options: Sequence[str],
    timeout_s: float,
) -> Iterator[Server]:
    """`vllm serve` on a free port of 127.0.0.1, ended at the end of the block with all its processes.

    Args:
        command: vLLM's own.
        log: gets what it prints.
        options: of `vllm serve`.
        timeout_s: of its start, and of one request.

    Raises:
        ServerFailed: it ended before it answered, or was not up in time.
    """
    port = _free_port()
    words = [str(command), "serve", str(folder.absolute()), "--host", "127.0.0.1", "--port", str(port)]
    words += ["--served-model-name", NAME, *options]
    with log.open("wb") as sink:
        # a session of its own: the server starts processes, which a signal to the group reaches
        process = subprocess.Popen(
            words, env=environment, cwd=log.parent, stdout=sink, stderr=sink, start_new_session=True
        )
        with _killed_with_us(process.pid):
            try:
                server = Server(f"http://127.0.0.1:{port}", timeout_s)
                _wait(server, process, log, timeout_s)
                yield server
            finally:
                _end(process)


@contextmanager
def _killed_with_us(group: int) -> Iterator[None]:
    """A process that outlives this one if this one is killed, and kills the group then."""
    watch = subprocess.Popen(
        ["/bin/sh", "-c", WATCH, str(group)], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        yield
    finally:
        watch.kill()
        watch.communicate()


def _wait(server: Server, process: subprocess.Popen[bytes], log: Path, timeout_s: float) -> None:
    begun = time.monotonic()
    while not server.healthy():
        if process.poll() is not None:
            raise ServerFailed(f"vLLM refused: {reason(log.read_text(errors='replace'))}")
        if time.monotonic() - begun > timeout_s:
            raise ServerFailed(f"vLLM was not up after {timeout_s:.0f} s")
        time.sleep(0.5)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the server to end, then see to it that its whole group has."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):  # killed below
            process.wait(20)
    with suppress(ProcessLookupError):  # nothing of it is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def reason(log: str) -> str:
    """The line of a log that says why a server ended: the first error of Python's that is no consequence."""
    lines = [
        line.split("] ", 1)[-1].strip() if line.startswith("(") else line.strip() for line in log.splitlines()
    ]
    errors = [line.partition(" [type=")[0] for line in lines if _is_error(line)]
    telling = [line for line in errors if not any(words in line for words in CONSEQUENCES)]
    found = (telling or errors or [line for line in lines if line] or ["it printed nothing"])[0]
    return found[:300]


def _is_error(line: str) -> bool:
    if line.startswith("Value error, "):  # pydantic's, below its own line
        return True
    name = line.partition(":")[0]
    known = name.endswith(("Error", "Exception"))
    return known and all(part.isidentifier() for part in name.split("."))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
