"""vLLM under load: its server as a process on 127.0.0.1, requests at once over the streaming API.

TTFT: from the request to its first token. TPOT: mean seconds of a token after the first. Throughput: tokens
made in a second by all requests together. Memory: proportional set size of all of the server's processes.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from qtrain.bench.launch import WorkerFailed
from qtrain.export_command.readers import vllm_server
from qtrain.export_command.vllm_server import NAME, OPENER, Server, ServerFailed

from .workload import ANSWER_BATCH, LEAST, Workload

SAMPLE_SECONDS = 0.25
TOP = 1


@dataclass(frozen=True, slots=True)
class Stream:
    """When a request was sent, and when each of its tokens came; seconds of one clock."""

    sent: float
    arrived: list[float]


def serve(folder: Path, work: Workload, cache: Path) -> dict[str, Any]:
    """Everything that is asked of an engine.

    Raises:
        WorkerFailed: vLLM did not start, refused, or died.
    """
    longest = max(
        [len(prompt) + work.max_new_tokens for prompt in work.prompts]
        + [work.prompt_tokens + work.new_tokens + 1]
        + [len(window) + 1 for window in work.gate_windows]
    )
    try:
        with tempfile.TemporaryDirectory(prefix="qtrain-vllm-") as scratch:
            begun = time.perf_counter()
            with vllm_server(
                folder,
                Path(scratch),
                longest=longest,
                top=TOP,
                sequences=max(work.batches),
                threads=work.threads,
                timeout_s=work.timeout_s,
                cache=cache,
            ) as server:
                return _ask_all(server, work, time.perf_counter() - begun)
    except ServerFailed as error:
        raise WorkerFailed(str(error)) from error


def _ask_all(server: Server, work: Workload, load_s: float) -> dict[str, Any]:
    with ServerMemory() as memory:
        result = {
            "nll": [_nll(server, window) for window in work.gate_windows],
            "answers": _answers(server, work),
            "speed": [_load(server, work, size) for size in work.batches],
        }
    return result | {
        "load_s": load_s,
        "loaded_bytes": memory.loaded,
        "peak_bytes": memory.peak,
        "memory_method": f"PSS of the server's processes, every {SAMPLE_SECONDS} s",
        "facts": {"kernel": "vLLM's", "kv_cache": "1 GiB, reserved at the start"},
        "versions": {"vllm": server.version()},
    }


def _nll(server: Server, window: Sequence[int]) -> float:
    places = server.prompt_log_probs(window, TOP)
    return -sum(place[token] for token, place in zip(window[1:], places, strict=True)) / len(places)


def _answers(server: Server, work: Workload) -> list[list[int]]:
    def ask(prompt: Sequence[int]) -> list[int]:
        answer = server.complete(
            prompt,
            max_tokens=work.max_new_tokens,
            stop_token_ids=list(work.stop_ids),
            return_token_ids=True,
        )
        ids = [int(token) for token in answer["token_ids"]]
        if answer["finish_reason"] == "stop" and not (ids and ids[-1] in work.stop_ids):
            ids.append(work.stop_ids[0])  # it ended; the token that says so is not always returned
        return ids

    with ThreadPoolExecutor(ANSWER_BATCH) as pool:
        return list(pool.map(ask, work.prompts))


def _load(server: Server, work: Workload, size: int) -> dict[str, Any]:
    """`samples` times `size` requests at once, behind one time that warms up."""
    begun = time.perf_counter()
    found: dict[str, Any] = {"batch": size, "streams": []}
    with ThreadPoolExecutor(size) as pool:
        for number, requests in enumerate(work.requests(size)):
            gate = threading.Barrier(size)
            streams = list(
                pool.map(
                    lambda ids, gate=gate: _stream(server, ids, work.new_tokens + 1, gate),
                    requests,
                )
            )
            if number:
                found["streams"].append([[its.sent, *its.arrived] for its in streams])
            if number >= LEAST and time.perf_counter() - begun > work.budget_s:
                break
    return found


def _stream(server: Server, prompt: Sequence[int], tokens: int, gate: threading.Barrier) -> Stream:
    body = {
        "model": NAME,
        "prompt": list(prompt),
        "temperature": 0,
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"{server.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    gate.wait(server.timeout_s)
    sent = time.perf_counter()
    arrived: list[float] = []
    try:
        with OPENER.open(request, timeout=server.timeout_s) as answer:
            for choice in _events(answer):
                arrived += [time.perf_counter()] * len(choice.get("token_ids") or [])
    except OSError as error:
        raise ServerFailed(f"vLLM broke off a stream: {error}") from None
    if len(arrived) != tokens:
        raise ServerFailed(f"vLLM made {len(arrived)} of {tokens} tokens")
    return Stream(sent, arrived)


def _events(answer: Any) -> Iterator[dict[str, Any]]:
    """The choices of a stream of server-sent events."""
    for line in answer:
        text = line.decode().strip()
        if text.startswith("data: ") and text != "data: [DONE]":
            yield from json.loads(text.removeprefix("data: ")).get("choices", [])


class ServerMemory:
    """Memory of the processes that descend from this one: the server's. `loaded` first, then the `peak`."""

    def __enter__(self) -> ServerMemory:
        self.loaded = self.peak = descendants_pss()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, descendants_pss())


def descendants_pss() -> int:
    """Bytes, shared pages in shares, of every process that this one has started, directly or not."""
    parents: dict[int, int] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                stat = (path / "stat").read_text()
            except OSError:  # it has ended
                continue
            parents[int(path.name)] = int(stat.rpartition(")")[2].split()[1])
    mine = {int(Path("/proc/self").resolve().name)}
    found: set[int] = set()
    while True:
        more = {child for child, parent in parents.items() if parent in mine | found} - found
        if not more:
            break
        found |= more
    return sum(map(_pss, found))


def _pss(process: int) -> int:
    try:
        text = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:  # it has ended
        return 0
    return sum(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:"))
