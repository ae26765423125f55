"""Starting a worker: another interpreter, this very source, two threads, one JSON file back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .workload import Workload

ROOM = Path(__file__).resolve().parent

# The peers' environments do not hold this project, and its folder must not be on sys.path (where
# `statistics` would be ours): so the room is imported as a package of a private name.
BOOTSTRAP = """
import importlib.util, runpy, sys
room, worker = sys.argv.pop(1), sys.argv.pop(1)
spec = importlib.util.spec_from_file_location(
    "_qtrain_bench", room + "/__init__.py", submodule_search_locations=[room])
package = importlib.util.module_from_spec(spec)
sys.modules["_qtrain_bench"] = package
spec.loader.exec_module(package)
runpy.run_module("_qtrain_bench.workers." + worker, run_name="__main__", alter_sys=True)
"""


class WorkerFailed(Exception):
    """A worker ended without a result; the message is one line."""


def environment(threads: int) -> dict[str, str]:
    """The environment of every worker: CPU, so many threads, no hub, nothing reported to anyone."""
    quiet = {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    count = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    # By default a thread that waits for the others spins, which is charged as CPU time: on a machine with
    # other work, one and the same step then costs 2 or 12 CPU seconds. Sleeping, it costs what it computes.
    return {**os.environ, **quiet, **count, "OMP_WAIT_POLICY": "PASSIVE"}


def run_worker(
    python: Path,
    worker: str,
    *,
    folder: Path,
    work: Workload,
    task: str,
    dtype: str,
    options: dict[str, Any],
    steps: int,
    threads: int,
    timeout_s: float,
) -> dict[str, Any]:
    """Run `workers/<worker>.py` once and return the result it wrote.

    Raises:
        WorkerFailed: it crashed, was killed, or ran for longer than `timeout_s`.
    """
    job = {
        "folder": str(folder),
        "task": task,
        "dtype": dtype,
        "options": options,
        "steps": steps,
        "work": asdict(work),
    }
    return run_job(python, worker, job, threads=threads, timeout_s=timeout_s)


def run_job(
    python: Path,
    worker: str,
    job: dict[str, Any],
    *,
    threads: int,
    timeout_s: float,
    settings: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run `workers/<worker>.py` once with a job of its own kind and return the result it wrote.

    `output` (the JSON file to leave) and `scratch` (an empty folder) are added to the job, `settings` to its
    environment.

    Raises:
        WorkerFailed: as `run_worker`.
    """
    with tempfile.TemporaryDirectory(prefix="qtrain-bench-") as name:
        scratch = Path(name)
        output = scratch / "result.json"
        whole = job | {"output": str(output), "scratch": name}
        (scratch / "job.json").write_text(json.dumps(whole))
        command = [str(python), "-c", BOOTSTRAP, str(ROOM), worker, str(scratch / "job.json")]
        extra = {"HF_DATASETS_CACHE": str(scratch / "datasets")}
        try:
            done = subprocess.run(
                command,
                cwd=scratch,
                env=environment(threads) | extra | dict(settings or {}),
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise WorkerFailed(f"still running after {timeout_s:.0f} s") from None
        if done.returncode != 0 or not output.is_file():
            raise WorkerFailed(_reason(done.returncode, done.stderr))
        result: dict[str, Any] = json.loads(output.read_text())
        return result


def _reason(code: int, stderr: str) -> str:
    """One line that says how a worker ended."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")
    lines = [line for line in stderr.splitlines() if line.strip()]
    return f"exit code {code}: {lines[-1].strip() if lines else 'nothing on stderr'}"
