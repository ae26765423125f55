"""Checkpoints in their engines, a process each. Only one that serves what the files hold gets figures."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qtrain.bench.launch import WorkerFailed
from qtrain.bench.results import OK

from .candidates import Candidate
from .engines import Engine, engines_of
from .options import Options
from .quality import Quality
from .task import Task
from .workload import Workload

# An engine computes in 16 bits what we compute in 32; that changes the mean log-prob of a token by hundredths
# at most (0.01 was seen), a module that it reads wrongly by more than 0.5.
NLL_TOLERANCE = 0.1

Say = Callable[[str], None]


@dataclass(frozen=True)
class Turn:
    """One process."""

    candidate: Candidate
    engine: Engine
    round: int
    again: bool = False


def _turns(
    candidates: Sequence[Candidate], statuses: dict[str, str], options: Options
) -> Iterator[list[Turn]]:
    """Rounds, each in a random order of its own; the first that can run is there twice: the A/A run."""
    pairs = [
        (candidate, engine)
        for candidate in candidates
        if candidate.missing is None
        for engine in engines_of(candidate, options.engines, options.place, options.cache)
    ]
    runs = [pair for pair in pairs if pair[1].missing is None and statuses[pair[0].name] == OK]
    draw = random.Random(options.seed)
    for number in range(options.rounds):
        turns = [Turn(*pair, number) for pair in pairs]
        turns += [Turn(*pair, number, again=True) for pair in runs[:1]]
        yield draw.sample(turns, len(turns))


def serve(
    candidates: Sequence[Candidate],
    statuses: dict[str, str],
    qualities: dict[str, Quality],
    work: Workload,
    task: Task | None,
    options: Options,
    say: Say,
) -> list[dict[str, Any]]:
    """Samples, a process each: in rounds, the checkpoints in their order."""
    samples: list[dict[str, Any]] = []
    turns = [turn for one in _turns(candidates, statuses, options) for turn in one]
    try:
        for number, turn in enumerate(turns, 1):
            samples.append(_sample(number, turn, statuses, qualities, work, task))
            again = " (again)" if turn.again else ""
            name = f"{turn.candidate.name}{again}, {turn.engine.name}"
            say(f"{number}/{len(turns)} {name}: {samples[-1]['status']}")
    except KeyboardInterrupt:  # what is done is kept
        say(f"interrupted: {len(turns) - len(samples)} of {len(turns)} processes are missing")
    order = [candidate.name for candidate in candidates]
    return sorted(samples, key=lambda its: (its["again"], order.index(its["checkpoint"]), its["engine"]))


def _sample(
    number: int,
    turn: Turn,
    statuses: dict[str, str],
    qualities: dict[str, Quality],
    work: Workload,
    task: Task | None,
) -> dict[str, Any]:
    """One process, or why there is none."""
    name = turn.candidate.name
    sample: dict[str, Any] = {
        "checkpoint": name,
        "engine": turn.engine.name,
        "again": turn.again,
        "round": turn.round,
        "order": number,
        "status": OK,
    }
    if statuses[name] != OK:
        return sample | {"status": f"not run: {statuses[name].removeprefix('wrong: ')}"}
    if turn.engine.missing is not None:
        return sample | {"status": turn.engine.missing}
    expected = [math.log(its.perplexity_q) for its in qualities[name].windows]
    sample["perplexity"] = qualities[name].whole.perplexity_q
    return sample | _one(turn.engine, work, expected, task if turn.round == 0 else None)


def _one(engine: Engine, work: Workload, expected: Sequence[float], task: Task | None) -> dict[str, Any]:
    """Status, and what was measured where the engine serves the model that the files hold."""
    try:
        result = engine.run(work.without_prompts() if task is None else work)
    except WorkerFailed as error:
        return {"status": f"{_kind(str(error))}: {error}"}
    for speed in result["speed"]:
        speed["prompt_tokens"] = work.prompt_tokens
    found: dict[str, Any] = {"result": result}
    for number, (its, ours) in enumerate(zip(result["nll"], expected, strict=False)):
        if not abs(its - ours) <= NLL_TOLERANCE:
            return {
                "status": f"wrong: the engine's loss on window {number + 1} is {its:.3f}, the files' is "
                f"{ours:.3f}, within {NLL_TOLERANCE} was expected"
            }
    if task is not None:
        found["task"] = task.score(result.pop("answers"))
        if found["task"]["empty"] == len(task.prompts):
            return {"status": "wrong: it answers nothing to any prompt", "task": found["task"]}
    return found


def _kind(failure: str) -> str:
    """A process that ran out of memory is killed, or says so."""
    memory = "SIGKILL" in failure or "out of memory" in failure.lower() or "OutOfMemory" in failure
    return "out of memory" if memory else "failed"
