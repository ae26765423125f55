"""From the processes of the checkpoints' benchmark to rows of the long form.

A row of `quality` for every checkpoint, and one of `serve` for every checkpoint, engine and batch size, which
has the files' perplexity again: by it the page sets the checkpoints of one batch size beside each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .results import AGAIN, OK
from .statistics import Runs, noise_floor

Sample = Mapping[str, Any]
"""A process: `checkpoint`, `engine`, `again`, `status`, and, where that is ok, `result` and `task`."""


def quality_row(checkpoint: str, status: str, found: Mapping[str, Any] | None) -> dict[str, Any]:
    """Size, KL, perplexity of a checkpoint's bytes; `found` as the command's `judge` leaves it."""
    row: dict[str, Any] = {"op": "quality", "variant": checkpoint, "status": status, "figures": {}}
    if found is None:
        return row
    row["figures"] = {
        "size": found["size"],
        "KL": {"value": found["kl"], "interval": found["kl_interval"]},
        "perplexity": found["perplexity"],
        "top-1 agreement": found["top1"],
    }
    if found.get("bits") is not None:
        row["figures"]["bits per weight"] = found["bits"]
    return row | {"folder": found["folder"], "positions": found["positions"]}


def serve_rows(samples: Sequence[Sample], batches: Sequence[int], *, seed: int) -> list[dict[str, Any]]:
    """In the order in which checkpoints and engines first come; speed only where all processes are ok."""
    groups: dict[tuple[str, str, bool], list[Sample]] = {}
    for sample in samples:
        key = (str(sample["checkpoint"]), str(sample["engine"]), bool(sample["again"]))
        groups.setdefault(key, []).append(sample)
    rows = []
    for (checkpoint, engine, again), group in groups.items():
        status = next((str(its["status"]) for its in group if its["status"] != OK), OK)
        for batch in batches:
            row: dict[str, Any] = {
                "op": "serve",
                "variant": f"{checkpoint} in {engine}{AGAIN if again else ''}",
                "shape": {"batch": batch},
                "checkpoint": checkpoint,
                "engine": engine,
                "status": status,
                "figures": {},
            }
            if status == OK:
                row["figures"] = _figures(group, batch)
                row |= {"versions": group[0]["result"]["versions"], "facts": group[0]["result"]["facts"]}
            rows.append(row)
    return _with_floor(rows, seed)


def _figures(group: Sequence[Sample], batch: int) -> dict[str, Any]:
    results = [sample["result"] for sample in group]
    speeds = [next(its for its in result["speed"] if its["batch"] == batch) for result in results]
    figures: dict[str, Any] = {
        "memory loaded": {"runs": [[result["loaded_bytes"]] for result in results]},
        "memory": {"runs": [[result["peak_bytes"]] for result in results]},
    }
    for name in ("prefill", "decode", "TTFT", "TPOT", "throughput"):
        figures[name] = {"runs": [list(MEASURES[name](speed)) for speed in speeds]}
    if "perplexity" in group[0]:
        figures["perplexity"] = group[0]["perplexity"]
    task = next((sample["task"] for sample in group if "task" in sample), None)
    if task is not None:
        figures["task score"] = {"value": task["score"], "interval": task["interval"]}
    return figures


def _with_floor(rows: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """How far the reference's A/A run is from itself in decoding, for all rows of that batch size."""
    for row in rows:
        again = [
            other
            for other in rows
            if other["variant"].endswith(AGAIN)
            and other["status"] == OK
            and other["shape"]["batch"] == row["shape"]["batch"]
        ]
        first = [
            other
            for other in rows
            if again
            and other["variant"] == again[0]["variant"].removesuffix(AGAIN)
            and other["shape"] == again[0]["shape"]
            and other["status"] == OK
        ]
        if again and first:
            pair = [one[0]["figures"]["decode"]["runs"] for one in (first, again)]
            row["noise_floor"] = noise_floor(*pair, seed=seed)
    return rows


def requests_of(speed: Mapping[str, Any]) -> list[list[list[float]]]:
    """[samples][batch][sent, first token, second token ...] in seconds of one clock.

    A forward pass over a batch gives all of its requests their token at once.
    """
    if "streams" in speed:
        return [[list(stream) for stream in one] for one in speed["streams"]]
    found = []
    for prefill, steps in zip(speed["prefill_s"], speed["steps_s"], strict=True):
        times = [0.0, prefill]
        for step in steps:
            times.append(times[-1] + step)
        found.append([times] * speed["batch"])
    return found


def _first(requests: list[list[float]]) -> float:
    return max(times[1] for times in requests) - min(times[0] for times in requests)


def _prefill(speed: Mapping[str, Any]) -> list[float]:
    """Tokens of all prompts over the seconds until the last of them has its first token."""
    tokens = speed["batch"] * speed["prompt_tokens"]
    return [tokens / _first(requests) for requests in requests_of(speed)]


def _decode(speed: Mapping[str, Any]) -> list[float]:
    """Tokens after the first of each request, over the seconds from the earliest first to the last."""
    found = []
    for requests in requests_of(speed):
        made = sum(len(times) - 2 for times in requests)
        begun = min(times[1] for times in requests)
        found.append(made / (max(times[-1] for times in requests) - begun))
    return found


def _ttft(speed: Mapping[str, Any]) -> list[float]:
    return [times[1] - times[0] for requests in requests_of(speed) for times in requests]


def _tpot(speed: Mapping[str, Any]) -> list[float]:
    """Mean of each request, so that tokens that come two at a time count as they do for a reader."""
    return [
        (times[-1] - times[1]) / (len(times) - 2) for requests in requests_of(speed) for times in requests
    ]


def _throughput(speed: Mapping[str, Any]) -> list[float]:
    """Tokens made in a second, prefill included."""
    found = []
    for requests in requests_of(speed):
        seconds = max(times[-1] for times in requests) - min(times[0] for times in requests)
        found.append(sum(len(times) - 1 for times in requests) / seconds)
    return found


MEASURES: dict[str, Callable[[Mapping[str, Any]], Runs | list[float]]] = {
    "prefill": _prefill,
    "decode": _decode,
    "TTFT": _ttft,
    "TPOT": _tpot,
    "throughput": _throughput,
}
