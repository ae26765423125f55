"""What serves a checkpoint: transformers in the environment that can read it, or vLLM's server."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qtrain.bench.launch import run_job
from qtrain.bench.peers.environments import CACHE, Peer

from .candidates import Candidate
from .workload import Workload

Name = Literal["transformers", "vllm"]
NAMES: tuple[Name, ...] = ("transformers", "vllm")

Result = dict[str, Any]


@dataclass(frozen=True)
class Engine:
    """How one candidate is served.

    Attributes:
        name: in the engine column.
        missing: why it can't, with the remedy; None where it can.
        run: serves it once.

    `run` raises WorkerFailed where the engine refuses the checkpoint, fails or takes too long.
    """

    name: str
    missing: str | None
    run: Callable[[Workload], Result]


def engines_of(
    candidate: Candidate, wanted: tuple[Name, ...], device: str, cache: Path = CACHE
) -> list[Engine]:
    """The engines for a candidate, in their order."""
    found = []
    if "transformers" in wanted:
        found.append(_transformers(candidate, cache))
    if "vllm" in wanted:
        found.append(_vllm(candidate, device, cache))
    return found


def _transformers(candidate: Candidate, cache: Path) -> Engine:
    """Packed weights need GPTQModel's environment; where it is missing, our own reader unpacks them."""
    python, kind, settings = Path(sys.executable), candidate.kind, {}
    name = "transformers"
    if candidate.kind == "nf4":
        name = "transformers (bitsandbytes)"
    elif candidate.kind == "quantized":
        peer = Peer("gptqmodel", cache)
        if peer.missing() is None:
            name, python = "transformers (GPTQModel)", peer.python
            # it compiles its kernels for CPUs once, and on two cores loads nothing unless told of workers
            settings = {
                "TORCH_EXTENSIONS_DIR": str(peer.folder / "extensions"),
                "GPTQMODEL_CPU_WORKERS": "2",
            }
        else:
            name, kind = "transformers (dequantised)", "dequantized"  # type: ignore[assignment]

    def run(work: Workload) -> Result:
        nf4 = candidate.nf4
        job = work.as_job() | {
            "kind": kind,
            "folder": None if candidate.folder is None else str(candidate.folder.absolute()),
            "adapter": None if candidate.adapter is None else str(candidate.adapter.absolute()),
            "nf4": nf4
            and {"double_quant": nf4.double_quant, "dtype": str(nf4.compute_dtype).removeprefix("torch.")},
        }
        extra = dict(settings)
        if work.device == "cuda":
            extra["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        return run_job(
            python, "checkpoint", job, threads=work.threads, timeout_s=work.timeout_s, settings=extra
        )

    return Engine(name, None, run)


def _vllm(candidate: Candidate, device: str, cache: Path) -> Engine:
    from .vllm_load import serve

    missing = Peer("vllm", cache).missing()
    if device == "cuda":
        missing = "not run: the vLLM that is pinned here is for CPUs; --device cpu compares on the CPU"
    elif candidate.kind == "nf4":
        missing = "not served: a base in NF4 with an adapter beside it is no one folder; its exports are"

    def run(work: Workload) -> Result:
        assert candidate.folder is not None
        return serve(candidate.folder, work, cache)

    return Engine("vLLM", missing, run)
