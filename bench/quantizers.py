"""The exports and scores of the quantizers' benchmark, kept on disk so that a long run can go on.

<cache>/bench/quantizers/<windows and model>/<variant>-g<size>-<run>/
    sample.json   what was exported, at what cost, and its score
    checkpoint/   until it is scored
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qtrain.export.checkpoint import Checkpoint
from qtrain.export.errors import ExportError

from .launch import ROOM, WorkerFailed, run_job
from .peers.environments import find_peer
from .provenance import machine, provenance, source_state
from .quantizer_gate import check_scheme, check_score
from .quantizer_read import QuantizedFolder
from .quantizer_score import Judge
from .quantizer_text import Windows, digest
from .quantizer_variants import Variant

Say = Callable[[str], None]
Sample = dict[str, Any]
# what an export consists of that runs in this project's own environment, apart from its dependencies
OWN_CODE = {
    "quantize_ours": ("export", "qtrain/export_command", "qtrain/cli/export_quantize.py"),
    "quantize_nearest": ("export/formats",),
}


@dataclass(frozen=True)
class Plan:
    """What is run: the model, the text, how often."""

    model: Path
    windows: Windows
    group_sizes: tuple[int, ...]
    rounds: int
    peer_rounds: int
    threads: int
    timeout_s: float
    seed: int
    cache: Path

    @cached_property
    def folder(self) -> Path:
        """Of these windows, model and threads."""
        key = digest([self.model_about()["files"], self.windows.as_dict(), self.threads])[:12]
        return self.cache.absolute() / "bench" / "quantizers" / key

    def model_about(self) -> dict[str, Any]:
        """Which model it is."""
        checkpoint = Checkpoint.open(self.model)
        return {
            "name": self.model.name,
            "files": {file: checkpoint.sha256(file) for file in checkpoint.files},
            "bytes": checkpoint.nbytes,
        }

    def protocol(self) -> dict[str, Any]:
        """For the report."""
        return {
            "threads": self.threads,
            "rounds": self.rounds,
            "peer_rounds": self.peer_rounds,
            "seed": self.seed,
            "order": "exports in random order, one process each",
            "time": "from the model's folder to the checkpoint on disk, libraries imported before",
            "memory": "peak resident memory above what is resident once the library is imported",
            "kl": "KL(16-bit model || quantised), every position of the held-out windows, float32 arithmetic",
        }

    def runs(self, chosen: list[Variant]) -> Iterator[Run]:
        """Every export, each round in a random order of its own."""
        draw = random.Random(self.seed)
        for turn in range(max(self.rounds, self.peer_rounds)):
            wanted = [
                Run(self, variant, size, turn)
                for size in self.group_sizes
                for variant in chosen
                if turn < (self.rounds if variant.ours else self.peer_rounds)
            ]
            yield from draw.sample(wanted, len(wanted))


@dataclass(frozen=True)
class Run:
    """One export of one variant."""

    plan: Plan
    variant: Variant
    group_size: int
    turn: int

    @property
    def folder(self) -> Path:
        """Where it is kept."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.variant.name.lower()).strip("-")
        return self.plan.folder / f"{slug}-g{self.group_size}-{self.turn + 1}"

    @property
    def checkpoint(self) -> Path:
        """What the worker writes."""
        return self.folder / "checkpoint"

    def made_by(self) -> str:
        """Changes when the code does that makes the export."""
        worker = self.variant.worker
        files = [ROOM / "workers" / f"{worker}.py"]
        if self.variant.peer is not None:
            files.append(find_peer(self.variant.peer, self.plan.cache).requirements)
        for place in OWN_CODE.get(worker, ()):
            path = ROOM.parent / place
            files += [path] if path.is_file() else sorted(path.rglob("*.py"))
        found = hashlib.sha256(json.dumps(self.variant.options, sort_keys=True).encode())
        for file in files:
            found.update(f"{file.name}\0".encode() + file.read_bytes())
        return found.hexdigest()

    def about(self) -> Sample:
        """What is known of it beforehand."""
        fixed = {"group_size": self.group_size, "run": self.turn + 1, "made_by": self.made_by()}
        return asdict(self.variant) | fixed

    def load(self) -> Sample | None:
        """The sample, if it was made by the code that is here now."""
        path = self.folder / "sample.json"
        if not path.is_file():
            return None
        sample: Sample = json.loads(path.read_text())
        return sample if sample["made_by"] == self.made_by() else None

    def save(self, sample: Sample) -> None:
        """Whole or not at all."""
        partial = self.folder / "sample.partial"
        partial.write_text(json.dumps(sample))
        partial.rename(self.folder / "sample.json")


def export_all(plan: Plan, chosen: list[Variant], *, resume: bool, say: Say) -> None:
    """Run every export that is not there yet; a failure is a sample too."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    windows = plan.folder / "calibration.json"
    windows.write_text(json.dumps(plan.windows.calibration))
    runs = list(plan.runs(chosen))
    for number, run in enumerate(runs, 1):
        sample = run.load() if resume else None
        if sample is None or sample["status"] != "ok":
            sample = _export(run, windows)
        say(f"{number}/{len(runs)} {run.variant.name}, group {run.group_size}: {_told(sample)}")


def _told(sample: Sample) -> str:
    cost = sample.get("result")
    if cost is None:
        return str(sample["status"])
    return f"{cost['cpu_s']:.0f} CPU s, {cost['wall_s']:.0f} s"


def _export(run: Run, windows: Path) -> Sample:
    variant, plan = run.variant, run.plan
    missing = variant.missing(plan.cache)
    shutil.rmtree(run.folder, ignore_errors=True)
    run.folder.mkdir(parents=True)
    sample: Sample = run.about() | {"status": missing or "ok"}
    if missing is None:
        here = provenance(())
        sample |= {"time": here["time"], "source": source_state(ROOM), "load": machine()["load"]}
        job = {
            "model": str(plan.model),
            "windows": str(windows),
            "checkpoint": str(run.checkpoint),
            "options": variant.options | {"group_size": run.group_size, "symmetric": variant.symmetric},
        }
        try:
            sample["result"] = run_job(
                variant.python(plan.cache),
                variant.worker,
                job,
                threads=plan.threads,
                timeout_s=plan.timeout_s,
            )
        except WorkerFailed as error:
            sample["status"] = f"failed: {error}"
    run.save(sample)
    return sample


def score_all(plan: Plan, chosen: list[Variant], say: Say) -> list[Sample]:
    """All samples, each with its score; a checkpoint goes once it has one.

    What has not been exported, or by other code than is here now, is a sample that says so.
    """
    judge = Judge(plan.model, plan.windows.held_out)
    known: dict[str, Sample] = {}  # by the checkpoint's hash: equal ones are scored once
    samples = []
    for run in plan.runs(chosen):
        sample = run.load()
        if sample is None:
            sample = run.about() | {"status": "not run"}
        if sample["status"] == "ok" and "score" not in sample:
            _score(run, sample, judge, known)
            run.save(sample)
            shutil.rmtree(run.checkpoint, ignore_errors=True)
            say(f"scored {run.variant.name}, group {run.group_size}: {sample['status']}")
        if "score" in sample:
            known[sample["sha256"]] = sample
        samples.append(sample)
    return samples


def _score(run: Run, sample: Sample, judge: Judge, known: dict[str, Sample]) -> None:
    try:
        folder = QuantizedFolder(run.checkpoint)
        sample["sha256"] = digest(folder.hashes)
        same = known.get(sample["sha256"])
        if same is not None:
            sample |= {key: same[key] for key in ("sizes", "score", "status")}
            return
        sizes = folder.sizes()
        sample["sizes"] = asdict(sizes)
        wrong = check_scheme(folder, sizes, group_size=run.group_size, symmetric=run.variant.symmetric)
        if wrong is None:
            score = judge.score(folder)
            sample["score"] = score.as_dict()
            wrong = check_score(score)
        sample["status"] = wrong or "ok"
    except (ExportError, ValueError) as error:
        sample["status"] = f"can't be read: {error}"
