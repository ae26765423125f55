"""The benchmark: the checkpoints' quality from their bytes, then those that pass, served in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from qtrain.bench.checkpoint_rows import quality_row, serve_rows
from qtrain.bench.provenance import gpu_clocks, provenance
from qtrain.bench.results import OK
from qtrain.errors import UserError
from qtrain.export.errors import ExportError
from qtrain.export.verify import Bounds, parse_gate
from qtrain.export_command.calibrate import RowsSettings, text_windows
from qtrain.export_command.rows import Windows, held_out_windows
from qtrain.export_command.source import Source, find_source

from .candidates import Candidate, find_candidates, reference_model
from .options import Options
from .quality import Judge, Quality
from .serving import serve
from .task import Task, find_task
from .workload import LEAST, Workload

Say = Callable[[str], None]


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
    samples = serve(candidates, statuses, qualities, work, task, options, say)
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
        why = windows.missing or "they are too short"
        raise UserError(f"no rows to measure on: {why}" + ("" if "--data" in why else "; give --data FILE"))
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
        "samples": f"{options.samples}, or as many as {options.budget_s:g} s give, but {LEAST}",
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
