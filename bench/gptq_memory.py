"""Peak memory of a GPTQ export: random weights in the shape of Qwen2.5-7B, cut to a few layers.

python -m qtrain.bench.gptq_memory --layers 2 4

The whole of `qtrain export gptq` with its defaults, the comparison with the 16-bit model included, on random
tokens. One decoder layer is in memory at a time, so that the peak is the same for all 28 layers.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .launch import run_job
from .provenance import provenance
from .random_model import QWEN2, write_random_model

SHAPE = {  # Qwen2.5-7B's
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "rope_theta": 1e6,
}
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Export:
    """What is exported, and how.

    Attributes:
        windows, length: of calibration: random tokens.
        held_out: windows to compare with the 16-bit model on.
        words: of the command line, other than its defaults; random weights pass no gate.
        threads: of the process.
    """

    windows: int = 16
    length: int = 512
    held_out: int = 2
    words: tuple[str, ...] = ()
    threads: int = 2


def measure(base: Path, out: Path, export: Export) -> dict[str, Any]:
    """The export in a process of its own.

    Returns:
        `baseline_bytes` (torch imported), `peak_bytes`, `wall_s`, `cpu_s`, `settings`.

    Raises:
        WorkerFailed: in a line.
    """
    import torch

    vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    count = export.windows + export.held_out
    ids = torch.randint(0, vocabulary, (count, export.length), generator=generator).tolist()
    job = {
        "model": str(base),
        "checkpoint": str(out),
        "words": ["gptq", "--gate", "off", *export.words],
        "calibration": ids[: export.windows],
        "held_out": ids[export.windows :],
    }
    return run_job(Path(sys.executable), "export_memory", job, threads=export.threads, timeout_s=24 * 3600)


def row(shape: dict[str, Any], size: int, export: Export, found: dict[str, Any]) -> dict[str, Any]:
    """Of the result file: `results.py` has its form."""
    added = found["peak_bytes"] - found["baseline_bytes"]
    return {
        "op": "export gptq",
        "variant": "qtrain",
        "dtype": "int4",
        "shape": {
            "layers": shape["num_hidden_layers"],
            "hidden": shape["hidden_size"],
            "windows": export.windows,
        },
        "status": "ok",
        "figures": {"memory": added, "wall time": found["wall_s"], "CPU time": found["cpu_s"]},
        "details": found | {"export": asdict(export), "base_bytes": size},
    }


def main(words: Sequence[str] | None = None) -> None:
    """Print the peak above torch's import for each number of layers."""
    parser = argparse.ArgumentParser(prog="python -m qtrain.bench.gptq_memory")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--windows", type=int, default=16, help="of calibration")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--words", default="", help="further words of `qtrain export gptq`")
    parser.add_argument("--shape", type=json.loads, default={}, help="other sizes than Qwen2.5-7B's, as JSON")
    parser.add_argument("--folder", type=Path, default=None, help="where to write (default: a temporary one)")
    parser.add_argument("--json", type=Path, default=None, help="where to write the result")
    chosen = parser.parse_args(words)
    export = Export(chosen.windows, chosen.length, words=tuple(chosen.words.split()))
    rows = []
    for layers in chosen.layers:
        shape = SHAPE | chosen.shape | {"num_hidden_layers": layers}
        with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
            base = Path(name) / "base"
            write_random_model(base, QWEN2 | shape, 10**9)
            size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
            found = measure(base, Path(name) / "out", export)
        rows.append(row(shape, size, export, found))
        added, before = rows[-1]["figures"]["memory"] / MIB, found["baseline_bytes"] / MIB
        sys.stdout.write(
            f"{layers} layers ({size / 1e9:.2f} GB): peak {added:.0f} MiB above torch's import "
            f"({before:.0f} MiB), {found['wall_s']:.0f} s, {found['cpu_s']:.0f} CPU s\n"
        )
        sys.stdout.flush()
        if chosen.json is not None:  # after each: the next takes an hour
            _write(chosen.json, rows, export, SHAPE | chosen.shape)


def _write(path: Path, rows: list[dict[str, Any]], export: Export, shape: dict[str, Any]) -> None:
    result = {
        "kind": "export memory",
        "provenance": provenance(),
        "protocol": {"threads": export.threads, "setting": {"shape": shape}},
        "rows": rows,
    }
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
