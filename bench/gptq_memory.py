"""Peak memory of a GPTQ export: random weights in the shape of Qwen2.5-7B, cut to a few layers.

python -m qtrain.bench.gptq_memory --layers 2 4

One decoder layer is in memory at a time, so that the peak is the same for all 28 layers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .measure import PeakMemory, Stopwatch
from .random_model import QWEN2, write_random_model

SHAPE = {  # Qwen2.5-7B's
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "rope_theta": 1e6,
}
DEFAULTS = {"correction": 0.5, "scaling": "awq"}  # those of `qtrain export gptq` that StageSettings' are not


@dataclass(frozen=True, slots=True)
class Export:
    """What is exported, and how.

    Attributes:
        windows, length: of calibration: random tokens.
        bits, group_size: of the scheme.
        settings: of StageSettings, other than the defaults.
        dtype: of the forward, as torch calls it; auto is the command line's choice.
    """

    windows: int = 16
    length: int = 512
    bits: int = 4
    group_size: int = 128
    settings: dict[str, Any] | None = None
    dtype: str = "auto"


def export_once(base: Path, out: Path, export: Export) -> dict[str, Any]:
    """Quantise in this process; MiB `before` (torch imported) and `above` that at the peak, seconds."""
    import torch

    memory = PeakMemory()
    from qtrain.export.checkpoint import Checkpoint
    from qtrain.export.formats import gptq
    from qtrain.export.formats.scheme import Scheme
    from qtrain.export.journal import Journal
    from qtrain.export.layerwise import Compute, Step, native_dtype, quantize_layers
    from qtrain.export.merged_weights import MergedWeights
    from qtrain.export.quantize_stage import StageSettings
    from qtrain.export.structure import find_structure

    structure = find_structure(base)
    vocabulary = structure.model.config.vocab_size
    cpu = torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(0, vocabulary, (export.windows, export.length), generator=generator)
    peaks: dict[str, float] = {}

    def note(step: Step) -> None:
        name = step.module.rpartition(".")[2]
        peaks[name] = max(peaks.get(name, 0.0), memory.added() / 2**20)

    with Stopwatch() as watch:
        quantize_layers(
            structure,
            MergedWeights(Checkpoint.open(base), None),
            windows,
            dict.fromkeys(structure.linears(), Scheme(export.bits, export.group_size)),
            StageSettings(**(export.settings or {})),
            gptq.pack,
            Journal(out, {}),
            Compute(cpu, native_dtype(cpu) if export.dtype == "auto" else getattr(torch, export.dtype)),
            note,
        )
    memory.close()
    return {
        "before": memory.baseline / 2**20,
        "above": memory.added() / 2**20,
        "after_module": peaks,
        "seconds": watch.cost.wall_s,
        "cpu_seconds": watch.cost.cpu_s,
    }


def measure(base: Path, out: Path, export: Export) -> dict[str, Any]:
    """`export_once` in a process of its own."""
    code = (
        "import json, sys; from pathlib import Path; "
        "from qtrain.bench.gptq_memory import Export, export_once; base, out, export = sys.argv[1:]; "
        "print(json.dumps(export_once(Path(base), Path(out), Export(**json.loads(export)))))"
    )
    words = [str(base), str(out), json.dumps(asdict(export))]
    text = subprocess.check_output([sys.executable, "-c", code, *words], text=True)
    found: dict[str, Any] = json.loads(text.splitlines()[-1])
    return found


def main() -> None:
    """Print the peak above torch's import for each number of layers."""
    parser = argparse.ArgumentParser(prog="python -m qtrain.bench.gptq_memory")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--windows", type=int, default=16, help="of calibration")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--dtype", default="auto", help="of the forward: auto, float32, bfloat16")
    parser.add_argument("--settings", type=json.loads, default=DEFAULTS, help="of StageSettings, as JSON")
    parser.add_argument("--shape", type=json.loads, default={}, help="other sizes than Qwen2.5-7B's, as JSON")
    parser.add_argument("--folder", type=Path, default=None, help="where to write (default: a temporary one)")
    chosen = parser.parse_args()
    export = Export(
        chosen.windows,
        chosen.length,
        group_size=chosen.group_size,
        settings=chosen.settings,
        dtype=chosen.dtype,
    )
    for layers in chosen.layers:
        with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
            base = Path(name) / "base"
            write_random_model(base, QWEN2 | SHAPE | chosen.shape | {"num_hidden_layers": layers}, 10**9)
            size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
            found = measure(base, Path(name) / "out", export)
        _say(
            f"{layers} layers ({size / 1e9:.2f} GB): peak {found['above']:.0f} MiB above torch's import "
            f"({found['before']:.0f} MiB), {found['seconds']:.0f} s, {found['cpu_seconds']:.0f} CPU s"
        )
        after = ", ".join(f"{module} {peak:.0f}" for module, peak in found["after_module"].items())
        _say(f"  peak so far when a module was done, in any layer: {after}")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
