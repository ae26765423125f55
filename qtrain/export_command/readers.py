"""What other people's code reads in a model folder, against what we say it holds.

Each reader runs in an environment of its own (`python -m qtrain.bench.peers install NAME`).
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from qtrain.bench.launch import environment
from qtrain.bench.peers.environments import CACHE, Peer
from qtrain.errors import QtrainError, UserError

from .vllm_server import Server, serving

ENVIRONMENTS = {"vllm": "vllm", "gptqmodel": "gptqmodel", "transformers": "gptqmodel"}
READERS = tuple(ENVIRONMENTS)
WORKER = Path(__file__).with_name("reader_worker.py")
# The worker's own folder must not be on sys.path: a file of it could stand for a module of the library's.
RUN_FILE = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"


class ReaderFailed(QtrainError):
    """A reader could not read a folder; one line, with its reason."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a reader made of a folder.

    Attributes:
        reader: its name.
        facts: versions, and the dtype and kernel where they are known.
        seconds: start, loading and reading together.
        targets: [n, T-1] log-prob of each window's own next token.
        top_ids, top_log_probs: [n, T-1, C] the likeliest next tokens.
        prompts: as they were given.
        greedy: [m, new] the likeliest tokens after each prompt, one after the other.
    """

    reader: str
    facts: dict[str, str]
    seconds: float
    targets: Tensor
    top_ids: Tensor
    top_log_probs: Tensor
    prompts: list[list[int]]
    greedy: Tensor


@dataclass(frozen=True, slots=True)
class Comparison:
    """A reading against the reference's logits.

    Attributes:
        positions: that were compared.
        difference: largest |difference| of a log-prob of a next token or of a likeliest one.
        spread: root of the mean square of these differences.
        greedy_tokens: that the reader chose.
        greedy_same: of them, which the reference puts first as well, after the same tokens.
        worst_margin: by how much the reference's log-prob of its first is above that of the reader's choice;
            0 where all are the same, small where two tokens are almost tied.
    """

    positions: int
    difference: float
    spread: float
    greedy_tokens: int
    greedy_same: int
    worst_margin: float


def missing(reader: str, cache: Path = CACHE) -> str | None:
    """Why a reader can't be run, with the command that installs it; None when it can.

    Raises:
        UserError: there is no such reader.
    """
    if reader not in ENVIRONMENTS:
        raise UserError(f"there is no reader {reader!r}; there are {', '.join(READERS)}")
    return Peer(ENVIRONMENTS[reader], cache).missing()


def read_with(
    reader: str,
    folder: Path,
    windows: Sequence[Sequence[int]],
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int = 32,
    top: int = 20,
    dtype: str = "auto",
    threads: int = 2,
    timeout_s: float = 600,
    cache: Path = CACHE,
) -> Reading:
    """Let `reader` read `folder`: log-probs on windows of the same length, greedy tokens after prompts.

    Args:
        reader: vllm, gptqmodel or transformers.
        top: log-probs at each position, besides that of the window's next token.
        dtype: of the reader's arithmetic: auto (the folder's), float16, bfloat16, float32.
        timeout_s: of a reader's start, and of its work.

    Raises:
        UserError: the reader is unknown or not installed.
        ReaderFailed: it refused the folder, failed, or took too long.
    """
    reason = missing(reader, cache)
    if reason:
        raise UserError(f"reader {reader} is {reason}")
    given = [[int(token) for token in window] for window in windows]
    starts = [[int(token) for token in prompt] for prompt in prompts]
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="qtrain-reader-") as name:
        scratch = Path(name)
        if reader == "vllm":
            found = _vllm(
                folder,
                given,
                starts,
                new_tokens,
                scratch,
                top=top,
                dtype=dtype,
                threads=threads,
                timeout_s=timeout_s,
                cache=cache,
            )
        else:
            job = {
                "reader": reader,
                "folder": str(folder.absolute()),
                "windows": given,
                "prompts": starts,
                "new_tokens": new_tokens,
                "top": top,
                "dtype": dtype,
                "threads": threads,
                "output": str(scratch / "found.safetensors"),
            }
            found = _worker(Peer(ENVIRONMENTS[reader], cache), job, scratch, timeout_s)
    facts, tensors = found
    return Reading(reader, facts, round(time.monotonic() - begun, 1), prompts=starts, **tensors)


def compare(
    reading: Reading, windows: Sequence[Sequence[int]], logits: Callable[[Tensor], Tensor]
) -> Comparison:
    """Hold a reading against a reference.

    The reader's greedy tokens are given to the reference, so that a choice between two almost tied tokens
    makes one difference, not a different text.

    Args:
        windows: as they were read.
        logits: of the reference, [n, T] int64 -> [n, T, V].
    """
    tokens = torch.tensor([list(window) for window in windows])
    expected = logits(tokens)[:, :-1].double().log_softmax(-1)  # [n, T-1, V]
    own = expected.gather(2, tokens[:, 1:, None])[..., 0]
    likeliest = expected.gather(2, reading.top_ids)
    differences = torch.cat(
        [(reading.targets - own).flatten(), (reading.top_log_probs - likeliest).flatten()]
    )
    same, margins = 0, [0.0]
    for prompt, chosen in zip(reading.prompts, reading.greedy, strict=True):
        whole = torch.cat([torch.tensor(prompt), chosen])
        after = logits(whole[None])[0, len(prompt) - 1 : -1].double().log_softmax(-1)  # [new, V]
        margin = after.amax(1) - after.gather(1, chosen[:, None])[:, 0]
        same += int((margin == 0).sum())
        margins.append(float(margin.max()))
    return Comparison(
        positions=own.numel(),
        difference=float(differences.abs().max()),
        spread=float(differences.square().mean().sqrt()),
        greedy_tokens=reading.greedy.numel(),
        greedy_same=same,
        worst_margin=max(margins),
    )


Found = tuple[dict[str, str], dict[str, Tensor]]


def _worker(peer: Peer, job: dict[str, Any], scratch: Path, timeout_s: float) -> Found:
    (scratch / "job.json").write_text(json.dumps(job))
    command = [str(peer.python), "-c", RUN_FILE, str(WORKER), str(scratch / "job.json")]
    # GPTQModel compiles its kernels for CPUs once, and on two cores loads nothing unless told of workers
    extra = {"TORCH_EXTENSIONS_DIR": str(peer.folder / "extensions"), "GPTQMODEL_CPU_WORKERS": "2"}
    try:
        done = subprocess.run(
            command,
            cwd=scratch,
            env=environment(job["threads"]) | extra,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=2 * timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ReaderFailed(f"{job['reader']} was still reading after {2 * timeout_s:.0f} s") from None
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        why = lines[-1] if lines else "nothing on stderr"
        raise ReaderFailed(f"{job['reader']} can't read {job['folder']}: {why[:300]}")
    with safe_open(job["output"], "pt") as file:
        return dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _vllm(
    folder: Path,
    windows: list[list[int]],
    prompts: list[list[int]],
    new_tokens: int,
    scratch: Path,
    *,
    top: int,
    dtype: str,
    **options: Any,
) -> Found:
    longest = max(len(window) + 1 for window in windows)
    longest = max([longest, *(len(prompt) + new_tokens for prompt in prompts)])
    with vllm_server(folder, scratch, longest=longest, top=top, dtype=dtype, **options) as server:
        places = [server.prompt_log_probs(window, top) for window in windows]
        greedy = [server.greedy(prompt, new_tokens) for prompt in prompts]
        facts = {"vllm": server.version(), "dtype": dtype}
    return facts, _tensors(windows, places, greedy, top)


def vllm_server(
    folder: Path,
    scratch: Path,
    *,
    longest: int,
    top: int = 20,
    dtype: str = "auto",
    sequences: int = 4,
    threads: int = 2,
    timeout_s: float = 600,
    cache: Path = CACHE,
) -> AbstractContextManager[Server]:
    """vLLM's server with a folder, for a `with` block.

    Args:
        scratch: a folder for its log and caches.
        longest: tokens of a request, with those that are made.
        sequences: requests that it works on at once.
        threads: of all of it. One is the HTTP server's, as vLLM's own choice is: with as many as there are
            processors, each token waits until the two have been scheduled past each other.
    """
    peer = Peer(ENVIRONMENTS["vllm"], cache)
    options = ["--dtype", dtype, "--max-model-len", str(longest), "--enforce-eager"]
    options += ["--max-num-seqs", str(sequences), "--max-logprobs", str(top), "--generation-config", "vllm"]
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        options.append("--skip-tokenizer-init")
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "VLLM_CACHE_ROOT": str(scratch / "cache"),
        "VLLM_CONFIG_ROOT": str(scratch / "config"),
        "PYTHONUNBUFFERED": "1",
        "GOMP_SPINCOUNT": "20000",  # a thread that sleeps at every product's end takes longer to wake
    }
    inherited = environment(max(1, threads - 1))
    del inherited["OMP_WAIT_POLICY"]  # it would come first
    return serving(
        peer.folder / "bin" / "vllm",
        folder,
        inherited | settings,
        log=scratch / "vllm.log",
        options=options,
        timeout_s=timeout_s,
    )


def _tensors(
    windows: list[list[int]], places: list[list[dict[int, float]]], greedy: list[list[int]], top: int
) -> dict[str, Tensor]:
    """vLLM gives the `top` likeliest tokens and the window's own, where that is not among them."""
    targets, ids, values = [], [], []
    for window, given in zip(windows, places, strict=True):
        targets.append([place[token] for token, place in zip(window[1:], given, strict=True)])
        ranked = [sorted(place.items(), key=lambda item: -item[1])[:top] for place in given]
        ids.append([[token for token, _ in place] for place in ranked])
        values.append([[value for _, value in place] for place in ranked])
    return {
        "targets": torch.tensor(targets),
        "top_ids": torch.tensor(ids),
        "top_log_probs": torch.tensor(values),
        "greedy": torch.tensor(greedy),
    }
