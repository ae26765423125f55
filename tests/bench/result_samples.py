"""Small results of each benchmark, as their commands write them; tests change them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

QUIET = (1.0, 1.01, 0.99, 1.02, 0.98, 1.0, 1.01, 0.99)
AGAIN = (1.01, 1.02, 0.98, 1.01, 1.0, 0.99, 1.0, 1.02)  # the same within about 3 %

Json = dict[str, Any]


def provenance() -> Json:
    return {
        "time": "2026-11-01T10:00:00+00:00",
        "command": ["qtrain", "bench", "kernels"],
        "source": {"commit": "0123456789abcdef", "dirty": False},
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "machine": {"cpu": "Some CPU", "cpu_features": ["avx2"], "cores": 2, "gpus": [], "threads": 2},
    }


def kernel_row(variant: str, seconds: Sequence[float], **changes: Any) -> Json:
    row = {
        "op": "lora_linear", "model": "0.5B", "part": "down", "base": "nf4", "dtype": "bf16", "rows": 512,
        "columns": [896], "inner": 4864, "rank": 64, "dropout_p": 0.05, "pass": "forward", "variant": variant,
        "status": "ok", "flops": 4.7e9, "ideal_bytes": 9.1e6, "errors": {"y0": 0.001}, "noise_floor": 0.03,
        "n": len(seconds), "p05_s": 0.98, "p50_s": 1.0, "p95_s": 1.02, "peak_bytes": 100 << 20,
        "samples_s": list(seconds),
    }  # fmt: skip
    row |= changes
    if row["status"] != "ok":
        for name in ("n", "p05_s", "p50_s", "p95_s", "peak_bytes", "samples_s"):
            del row[name]
    return row


def kernels() -> Json:
    rows = [
        kernel_row("qtrain", QUIET),
        kernel_row("qtrain (again)", AGAIN),
        kernel_row("peft", [1.4 * second for second in QUIET], peak_bytes=300 << 20),
        kernel_row("liger-kernel", [], status="not installed: pip install liger-kernel"),
    ]
    protocol = {"device": "cpu", "clock": "CPU time of all threads", "cold": True, "rates": None}
    return {"kind": "kernels", "provenance": provenance(), "protocol": protocol, "rows": rows}


def train_sample(name: str, cpu_s: Sequence[float], **changes: Any) -> Json:
    sample = {"task": "dpo", "round": 0, "order": 1, "name": name, "worker": "ours", "dtype": "bf16"}
    steps = [{"cpu_s": second, "wall_s": second / 2} for second in [9.0, *cpu_s]]
    sample["result"] = {
        "steps": steps, "reference": {"cpu_s": 1.5, "wall_s": 0.75}, "logs": [{"loss": 0.6931}],
        "baseline_bytes": 700 << 20, "peak_bytes": 1000 << 20,
    }  # fmt: skip
    return sample | {"status": "ok"} | changes


def train() -> Json:
    samples = [
        train_sample("qtrain", [2.0, 2.1]), train_sample("qtrain", [2.05, 1.95]),
        train_sample("qtrain (again)", [2.1, 2.0]), train_sample("qtrain (again)", [2.0, 2.05]),
        train_sample("TRL (default)", [8.0, 8.2]), train_sample("TRL (default)", [8.1, 8.3]),
    ]  # fmt: skip
    for sample in samples[-2:]:
        sample["result"] |= {"reference": None, "peak_bytes": 2700 << 20}
    rows = [{"task": "dpo", "name": name} for name in ("TRL (default)", "qtrain", "qtrain (again)")]
    protocol = {"threads": 2, "rounds": 2}
    workload = {"hidden_size": 512, "layers": 4, "seed": 0}
    return {
        "kind": "train", "provenance": provenance(), "protocol": protocol, "workload": workload, "rows": rows,
        "samples": samples,
    }  # fmt: skip


def checkpoints() -> Json:
    rows = [
        {
            "op": "gptq", "variant": name, "dtype": "int4 sym", "shape": {"group_size": 64}, "status": "ok",
            "figures": {"KL": {"value": kl, "interval": [kl - 0.01, kl + 0.01]}, "perplexity": ppl,
                        "size": 91_000_000, "time": {"samples": [30.0, 31.0, 29.5]}},
        }
        for name, kl, ppl in (("qtrain", 0.14, 20.5), ("GPTQModel", 0.19, 21.4))
    ]  # fmt: skip
    rows.append(
        {"op": "gptq", "variant": "auto-round", "dtype": "int4 sym", "status": "not installed: no wheel"}
    )
    return {"kind": "checkpoints", "provenance": provenance(), "protocol": {"threads": 2}, "rows": rows}


def save(report: Any, path: Path) -> Path:
    path.write_text(report if isinstance(report, str) else json.dumps(report))
    return path


def quantizers() -> Json:
    rows, runs = [], []
    for name, kl, cpu_s in (("qtrain gptq", 0.14, 40.0), ("GPTQModel GPTQ", 0.19, 90.0)):
        about = {"name": name, "group_size": 64, "symmetric": True, "status": "ok"}
        figures = {
            "kl": kl, "kl_low": kl - 0.01, "kl_high": kl + 0.01, "perplexity": 20 + 5 * kl, "top1": 0.8,
            "perplexity_16_bit": 20.0, "bits_per_weight": 4.25, "file_bytes": 91_000_000,
        }  # fmt: skip
        rows.append({"op": "quantize", "bits": 4, "n": 2, **about, **figures})
        cost = {"wall_s": cpu_s, "baseline_bytes": 300 << 20, "peak_bytes": 900 << 20}
        score = {"kl": [0.9 * kl, kl, 1.1 * kl, 1.01 * kl, 0.99 * kl]}
        for run in (1, 2):
            runs.append(about | {"run": run, "score": score, "result": cost | {"cpu_s": cpu_s + run}})
    missing = {"name": "auto-round (light)", "status": "not installed: python -m ..."}
    rows.append({"op": "quantize", "bits": 4, **about, **missing})
    protocol = {"threads": 2, "rounds": 2}
    return {
        "kind": "quantizers", "provenance": provenance(), "protocol": protocol, "rows": rows, "samples": runs
    }  # fmt: skip


def kernels_on_a_gpu() -> Json:
    report = kernels()
    report["protocol"] |= {"device": "cuda", "clock": "CUDA events"}
    rates = {"card": "RTX 4090", "half": 165.2e12, "single": 82.6e12, "memory": 1008e9}
    report["protocol"]["rates"] = rates
    report["provenance"]["machine"]["gpus"] = [{"name": "NVIDIA GeForce RTX 4090", "power.limit": "450.00 W"}]
    rows = []
    for tokens in (128, 512, 2048):
        variants = (("qtrain", 1.0, 10), ("qtrain (again)", 1.0, 10), ("peft", 2.0, tokens))
        for variant, factor, peak in variants:
            seconds = [1e-6 * tokens * factor * second for second in QUIET]
            changes = {"rows": tokens, "peak_bytes": peak << 20, "roofline_s": 3e-5, "roofline_share": 0.5}
            rows.append(kernel_row(variant, seconds, **changes))
    return report | {"rows": rows}


def cards() -> Json:
    def card(name: str, kernel: str, flops: float, spills: int) -> Json:
        seen = {
            "shape": {"rows": 512, "outputs": 1024, "inner": 1024},
            "ideal_bytes": 4e6, "touched_bytes": 4e6, "flops": flops, "bound": "tensor",
            "overlapped_us": 6.5, "serial_us": 13.0, "roofline_us": 6.5,
        }  # fmt: skip
        return {
            "specimen": name, "kernel": kernel, "arch": 89, "registers": 168,
            "spill_stores": spills, "spill_loads": 0, "shared_bytes": 65536, "occupancy": 0.25,
            "other_per_mma": 3.4, "emulated": seen, "over_budget": ["1 spill"] if spills else [],
        }  # fmt: skip

    found = [
        card("lora_linear forward nf4", "_forward_kernel", 1.07e9, 0),
        card("lora_linear dA", "_weight_grad_kernel", 6.7e7, 1),
        card("nf4_dequantize bf16", "_dequantize_kernel", 0.0, 0),
    ]
    return {"kind": "cards", "timed": False, "provenance": provenance(), "cards": found, "failures": []}
