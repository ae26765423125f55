"""Peak memory of a merge: a random-weight Qwen2 in shards, an adapter on all its linear layers.

python -m qtrain.bench.merge_memory --size 3GB --shard 500MB
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .random_model import QWEN2, write_random_model


def make_model(folder: Path, size: int, shard: int, hidden: int, seed: int = 0) -> None:
    """A Qwen2 folder of about `size` bytes in shards of `shard`, written without holding it."""
    vocabulary, inner, heads = 16 * hidden, 4 * hidden, hidden // 64
    layer = 2 * (2 * hidden * hidden + 2 * hidden * hidden // 4 + 3 * hidden * inner)
    layers = max(1, round((size - 4 * vocabulary * hidden) / layer))
    config = QWEN2 | {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 4,
        "vocab_size": vocabulary,
    }
    write_random_model(folder, config, shard, seed)


def make_adapter(folder: Path, base: Path, rank: int) -> None:
    """A random LoRA adapter on every linear layer of the base but its head."""
    import torch

    from qtrain.export.nf4_base import nf4_modules
    from qtrain.export.tensors import read_specs, write_whole

    shapes = {
        name: spec.shape for file in base.glob("*.safetensors") for name, spec in read_specs(file).items()
    }
    tensors = {}
    for module in nf4_modules(base):
        n, k = shapes[f"{module}.weight"]
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, k) * k**-0.5
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(n, rank) * 0.01
    folder.mkdir(parents=True)
    write_whole(folder / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def merge_once(base: Path, adapter: Path, out: Path, kind: str, report: bool) -> dict[str, float]:
    """Merge in this process; its peak memory in MiB, before and after, and seconds."""
    import torch
    import transformers  # noqa: F401  (imported before the peak is looked at)

    from qtrain.export.checkpoint import Checkpoint
    from qtrain.export.lora import Adapter
    from qtrain.export.merge import merged_config, write_merged
    from qtrain.export.merge_report import merge_report
    from qtrain.export.merged_weights import MergedWeights
    from qtrain.export.nf4_base import NF4Settings, nf4_modules, nf4_round_trip
    from qtrain.export.writer import CheckpointWriter

    # what is loaded and allocated once, whatever the model's size
    nf4_modules(base)
    nf4_round_trip(torch.randn(256, 256), NF4Settings())
    torch.randn(1024, 64).double() @ torch.randn(64, 512).double()
    before, start = peak_mib(), time.perf_counter()
    nf4 = NF4Settings(True, torch.bfloat16) if kind == "dequantized" else None
    weights = MergedWeights(Checkpoint.open(base), Adapter.open(adapter), base=kind, nf4=nf4)  # type: ignore[arg-type]
    with CheckpointWriter(out, max_shard_bytes=10**12, force=True) as writer:
        write_merged(writer, weights)
        folder = writer.seal(merged_config(weights))
        written = time.perf_counter() - start
        if report:
            windows = [list(range(64)), list(range(500, 564))]
            merge_report(weights, folder, windows, trained_on=nf4, compute_dtype=torch.bfloat16)
        writer.publish()
    return {"before": before, "peak": peak_mib(), "seconds": written}


def peak_mib() -> float:
    """The largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(base: Path, adapter: Path, out: Path, kind: str, report: bool) -> dict[str, float]:
    """`merge_once` in a process of its own."""
    words = [str(base), str(adapter), str(out), kind, str(int(report))]
    code = (
        "import json, sys; from pathlib import Path; from qtrain.bench.merge_memory import merge_once; "
        "base, adapter, out, kind, report = sys.argv[1:]; "
        "print(json.dumps(merge_once(Path(base), Path(adapter), Path(out), kind, report == '1')))"
    )
    text = subprocess.check_output([sys.executable, "-c", code, *words], text=True)
    found: dict[str, float] = json.loads(text.splitlines()[-1])
    return found


def main() -> None:
    """Print peak memory for both bases against the bound 2 shards + 1 GB."""
    from qtrain.export.disk import parse_size

    parser = argparse.ArgumentParser(prog="python -m qtrain.bench.merge_memory")
    parser.add_argument("--size", default="3GB", help="bytes of the base's weights")
    parser.add_argument("--shard", default="500MB")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to write (default: a temporary folder)"
    )
    parser.add_argument(
        "--no-report", action="store_true", help="merge alone, without the comparison of logits"
    )
    chosen = parser.parse_args()
    shard = parse_size(chosen.shard)
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        base, adapter = Path(name) / "base", Path(name) / "adapter"
        make_model(base, parse_size(chosen.size), shard, chosen.hidden)
        make_adapter(adapter, base, chosen.rank)
        sizes = [path.stat().st_size for path in base.glob("*.safetensors")]
        _say(f"base: {sum(sizes) / 1e9:.2f} GB in {len(sizes)} shards, the largest {max(sizes) / 1e6:.0f} MB")
        bound = (2 * max(sizes) + 1e9) / 2**20
        for kind in ("original", "dequantized"):
            found = measure(base, adapter, Path(name) / "out", kind, not chosen.no_report)
            _say(
                f"{kind}: peak {found['peak']:.0f} MiB ({found['before']:.0f} MiB after the imports), "
                f"bound 2 shards + 1 GB = {bound:.0f} MiB, {found['seconds']:.1f} s to merge"
            )


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
