"""The benchmark: the checkpoints' quality from their bytes, then those that pass, served in turn."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qtrain.bench.checkpoint_rows import quality_row, serve_rows
from qtrain.bench.launch import WorkerFailed
from qtrain.bench.peers.environments import CACHE
from qtrain.bench.provenance import gpu_clocks, provenance
from qtrain.bench.results import OK
from qtrain.errors import UserError
from qtrain.export.errors import ExportError
from qtrain.export.verify import Bounds, parse_gate
from qtrain.export_command.calibrate import RowsSettings, text_windows
from qtrain.export_command.rows import Windows, held_out_windows
from qtrain.export_command.source import Source, find_source

from .candidates import Candidate, find_candidates, reference_model
from .engines import NAMES, Engine, Name, engines_of
from .quality import Judge, Quality
from .task import Task, find_task
from .workload import Workload

# An engine computes in 16 bits what we compute in 32; that changes the mean log-prob of a token by hundredths
# at most (0.01 was seen), a module that it reads wrongly by more than 0.5.
NLL_TOLERANCE = 0.1

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    folders: list[Path] = field(default_factory=list)
    engines: tuple[Name, ...] = NAMES
    data: list[str] = field(default_factory=list)
    limit: int = 40
    max_new_tokens: int | None = None
    rows: int = 8
    tokens: int = 512
    gate: str | None = None
    batch: int = 4
    prompt_tokens: int = 128
    new_tokens: int = 32
    samples: int = 15
    rounds: int = 2
    threads: int = 2
    timeout_s: float = 900
    device: str = "auto"
    seed: int = 0
    cache: Path = CACHE

    @property
    def place(self) -> str:
        """The device that engines run on."""
        if self.device != "auto":
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"

    def work(self, windows: Windows, task: Task | None) -> Workload:
        """For the engines."""
        return Workload(
            windows=windows.ids,
            prompts=[] if task is None else task.prompts,
            stop_ids=[] if task is None else task.stop_ids,
            max_new_tokens=0 if task is None else task.max_new_tokens,
            batches=tuple(dict.fromkeys((1, self.batch))),
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens,
            samples=self.samples,
            threads=self.threads,
            device=self.place,
            timeout_s=self.timeout_s,
            seed=self.seed,
        )


def bench_checkpoints(name: str, options: Options, say: Say) -> dict[str, Any]:
    """The report as JSON.

    Raises:
        UserError, ExportError: no such run or folder, no rows to measure on, a damaged file of the run.
    """
    bounds = parse_gate(options.gate)
    if options.place == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device here; leave it out")
    source = find_source(name)
    candidates = find_candidates(source, options.folders)
    windows = _windows(source, options)
    task = find_task(source, options.data, options.limit, options.max_new_tokens)
    about = provenance()
    about["machine"] |= {"threads": options.threads, "gpu_clocks_before": gpu_clocks()}
    for line in source.notes:
        say(f"note: {line}")
    if not windows.held_out:
        say("note: the run has no held-out rows; KL and perplexity are of rows that it was trained on")
    if task is None:
        say("no task score: there are no held-out rows, or --limit is 0")
    qualities, statuses = _judge(source, candidates, windows, bounds, say)
    work = options.work(windows, task)
    samples = _serve(candidates, statuses, qualities, work, task, options, say)
    about["machine"]["gpu_clocks_after"] = gpu_clocks()
    rows = [
        quality_row(its.name, statuses[its.name], _quality_figures(its, qualities.get(its.name)))
        for its in candidates
    ]
    return {
        "kind": "checkpoints",
        "provenance": about,
        "protocol": _protocol(source, options, windows, task, work, bounds),
        "rows": rows + serve_rows(samples, work.batches, seed=options.seed),
        "quality": {name: found.as_dict() for name, found in qualities.items()},
        "samples": samples,
    }


def _windows(source: Source, options: Options) -> Windows:
    settings = RowsSettings(1, options.tokens, [], 0, options.data, options.rows, options.tokens)
    windows = text_windows(source, settings) or held_out_windows(
        source, options.data, options.rows, options.tokens
    )
    usable = [window for window in windows.ids if len(window) > 1]
    if not usable:
        raise UserError(f"no rows to measure on: {windows.missing or 'they are too short'}; give --data FILE")
    return Windows(usable, windows.files, windows.held_out)


def _judge(
    source: Source, candidates: Sequence[Candidate], windows: Windows, bounds: Bounds | None, say: Say
) -> tuple[dict[str, Quality], dict[str, str]]:
    """Quality by name of all that are there, and the status of every one."""
    say(f"reading {candidates[0].name}: {len(windows.ids)} windows, {sum(map(len, windows.ids))} tokens")
    judge = Judge(reference_model(source, candidates[0]), windows.ids)
    qualities: dict[str, Quality] = {}
    statuses: dict[str, str] = {}
    for candidate in candidates:
        if candidate.missing is not None:
            statuses[candidate.name] = candidate.missing
            say(f"{candidate.name}: {candidate.missing}")
            continue
        try:
            found = judge.score(candidate.model())
        except ExportError as error:
            statuses[candidate.name] = f"wrong: {error}"
        else:
            failure = found.failure(None if candidate.reference else bounds)
            qualities[candidate.name] = found
            statuses[candidate.name] = OK if failure is None else f"wrong: {failure}"
            whole = found.whole
            say(f"{candidate.name}: KL {whole.kl:.4g}, perplexity {whole.perplexity_q:.4g}")
        if statuses[candidate.name] != OK:
            say(f"{candidate.name}: {statuses[candidate.name]}")
    return qualities, statuses


def _quality_figures(candidate: Candidate, quality: Quality | None) -> dict[str, Any] | None:
    if quality is None:
        return None
    whole = quality.whole
    return {
        "size": candidate.size,
        "bits": candidate.bits,
        "kl": whole.kl,
        "kl_interval": list(quality.kl_interval()),
        "perplexity": whole.perplexity_q,
        "top1": whole.top1,
        "positions": whole.positions,
        "folder": str(candidate.folder),
    }


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


def _serve(
    candidates: Sequence[Candidate],
    statuses: dict[str, str],
    qualities: dict[str, Quality],
    work: Workload,
    task: Task | None,
    options: Options,
    say: Say,
) -> list[dict[str, Any]]:
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


def _protocol(
    source: Source,
    options: Options,
    windows: Windows,
    task: Task | None,
    work: Workload,
    bounds: Bounds | None,
) -> dict[str, Any]:
    return {
        "run": source.name,
        "device": work.device,
        "clock": "wall",
        "threads": options.threads,
        "rounds": options.rounds,
        "samples": options.samples,
        "warm_up": "one request of each batch size",
        "order": "rounds of one process for each checkpoint and engine, each round in random order",
        "seed": options.seed,
        "memory": "of the engine's processes with their libraries, after loading and at the peak since",
        "gate": "off" if bounds is None else f"kl={bounds.kl:g},ppl={bounds.ppl:g},top1={bounds.top1:g}",
        "kl": "KL(16-bit model || checkpoint), every position of the windows, float32, by qtrain's reader",
        "windows": windows.as_dict(),
        "task": None
        if task is None
        else {"files": task.files, "rows": len(task.rows), "max_new_tokens": task.max_new_tokens},
        "setting": {
            "model": source.base.name,
            "prompt_tokens": options.prompt_tokens,
            "new_tokens": options.new_tokens,
        },
    }
