"""From the samples of the quantizers' benchmark to long-form rows, comparisons, and a table's cells."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .quantizer_variants import VARIANTS
from .statistics import Runs, median, percentile
from .table import Column, figure

MIB = 1 << 20
RESAMPLES = 10_000
NEAREST = {variant.name for variant in VARIANTS if variant.worker == "quantize_nearest"}

COLUMNS = (
    Column("quantizer", numeric=False),
    Column("bits / weight"),
    Column("checkpoint, MiB"),
    Column("KL [95 %]"),
    Column("perplexity"),
    Column("same top token"),
    Column("CPU s"),
    Column("wall s"),
    Column("MiB added"),
    Column("status", numeric=False),
)
COMPARED = (
    Column("ours", numeric=False),
    Column("against", numeric=False),
    Column("KL, ours - its [95 %]"),
    Column("its KL / ours"),
    Column("quality", numeric=False),
    Column("its CPU time / ours"),
    Column("its MiB / ours"),
)


def mean_interval(values: Sequence[float], *, seed: int = 0) -> tuple[float, float, float]:
    """[low, mean, high]: the mean over windows and its 95 % bootstrap interval (percentiles).

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no values")
    found = np.asarray(values, np.float64)
    chosen = np.random.default_rng(seed).integers(len(found), size=(RESAMPLES, len(found)))
    low, high = np.percentile(found[chosen].mean(axis=1), [2.5, 97.5])
    return float(low), float(found.mean()), float(high)


def long_rows(samples: list[dict[str, Any]], *, seed: int) -> list[dict[str, Any]]:
    """One row for each variant and group size; figures only where every run passed the gate."""
    rows = []
    for group_size in dict.fromkeys(sample["group_size"] for sample in samples):
        for variant in VARIANTS:
            runs = [s for s in samples if (s["name"], s["group_size"]) == (variant.name, group_size)]
            if not runs:
                continue
            status = next((run["status"] for run in runs if run["status"] != "ok"), "ok")
            row = {
                "op": "quantize",
                "name": variant.name,
                "ours": variant.ours,
                "bits": 4,
                "group_size": group_size,
                "symmetric": variant.symmetric,
                "n": len(runs),
                "status": status,
            }
            rows.append(row | (_figures(runs, seed) if status == "ok" else {}))
    return rows


def _runs(runs: list[dict[str, Any]], field: str) -> Runs:
    return [[run["result"][field]] for run in runs]


def _figures(runs: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    first, score = runs[0]["result"], runs[0]["score"]
    cpu, wall = _runs(runs, "cpu_s"), _runs(runs, "wall_s")
    added = [[(run["result"]["peak_bytes"] - run["result"]["baseline_bytes"]) / MIB] for run in runs]
    low, kl, high = mean_interval(score["kl"], seed=seed)
    perplexity_p = math.exp(float(np.mean(score["log_perplexity_p"])))
    perplexity_q = math.exp(float(np.mean(score["log_perplexity_q"])))
    return {
        "cpu_s_p05": percentile(cpu, 5),
        "cpu_s_p50": median(cpu),
        "cpu_s_p95": percentile(cpu, 95),
        "wall_s_p05": percentile(wall, 5),
        "wall_s_p50": median(wall),
        "wall_s_p95": percentile(wall, 95),
        "added_mib_p50": median(added),
        "peak_mib_p50": median([[run["result"]["peak_bytes"] / MIB] for run in runs]),
        "kl": kl,
        "kl_low": low,
        "kl_high": high,
        "kl_max": max(score["kl_max"]),
        "perplexity_16_bit": perplexity_p,
        "perplexity": perplexity_q,
        "perplexity_increase": perplexity_q / perplexity_p - 1,
        "top1": float(np.mean(score["top1"])),
        "identical_runs": len({run["sha256"] for run in runs}) == 1,
        **runs[0]["sizes"],
        "settings": first["settings"],
        "versions": first["versions"],
    }


def comparisons(
    samples: list[dict[str, Any]], rows: list[dict[str, Any]], *, seed: int
) -> list[dict[str, Any]]:
    """Ours against every other row of the same group size and symmetry, window by window.

    `difference` is KL(ours) - KL(theirs) as [low, mean, high] of the paired windows.
    """
    kl = {(s["name"], s["group_size"]): s["score"]["kl"] for s in samples if s["status"] == "ok"}
    found = []
    for mine, other in _pairs([row for row in rows if row["status"] == "ok"]):
        pair = zip(kl[mine["name"], mine["group_size"]], kl[other["name"], other["group_size"]], strict=True)
        low, mean, high = mean_interval([a - b for a, b in pair], seed=seed)
        found.append(
            {
                "ours": mine["name"],
                "other": other["name"],
                "group_size": mine["group_size"],
                "symmetric": mine["symmetric"],
                "difference": [low, mean, high],
                "kl_ratio": other["kl"] / mine["kl"],
                "cpu_ratio": other["cpu_s_p50"] / mine["cpu_s_p50"],
                "wall_ratio": other["wall_s_p50"] / mine["wall_s_p50"],
                "memory_ratio": other["added_mib_p50"] / mine["added_mib_p50"],
                "verdict": "better" if high < 0 else "worse" if low > 0 else "no difference",
            }
        )
    return found


def _pairs(rows: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Ours and another row that is alike."""
    for mine in rows:
        for other in rows:
            alike = all(mine[key] == other[key] for key in ("bits", "group_size", "symmetric"))
            if mine["ours"] and not other["ours"] and alike:
                yield mine, other


def not_best(compared: list[dict[str, Any]]) -> list[str]:
    """A line for whatever a peer does better than ours: a lower KL, less time, less memory.

    Rounding to nearest, which calibrates on nothing, costs less than anything: only its KL counts.
    """
    lines = []
    for pair in compared:
        where = f"{pair['ours']}, group {pair['group_size']}"
        if pair["verdict"] == "worse":
            share = 1 - pair["kl_ratio"]
            lines.append(f"{where}: {pair['other']} loses less, its KL is {share:.0%} lower")
        costs = (("CPU time", pair["cpu_ratio"]), ("memory", pair["memory_ratio"]))
        for what, ratio in costs:
            if ratio < 1 and pair["other"] not in NEAREST:
                lines.append(f"{where}: {pair['other']} takes {ratio:.2f} of our {what}")
    return lines


def cells(row: dict[str, Any]) -> list[str]:
    """The cells of one row, as COLUMNS."""
    if row["status"] != "ok":
        return [row["name"], *["–"] * 8, row["status"]]
    return [
        row["name"],
        figure(row["bits_per_weight"], 2),
        figure(row["file_bytes"] / MIB, 0),
        f"{row['kl']:.4f} [{row['kl_low']:.4f}, {row['kl_high']:.4f}]",
        f"{row['perplexity']:.2f} ({row['perplexity_increase']:+.1%})",
        f"{row['top1']:.1%}",
        _spread(row, "cpu_s"),
        _spread(row, "wall_s"),
        figure(row["added_mib_p50"], 0),
        f"{row['n']} run{'s' if row['n'] > 1 else ''}",
    ]


def _spread(row: dict[str, Any], field: str) -> str:
    middle = figure(row[f"{field}_p50"], 0)
    if row["n"] < 2:
        return middle
    return f"{middle} [{figure(row[f'{field}_p05'], 0)}, {figure(row[f'{field}_p95'], 0)}]"


def compared_cells(pair: dict[str, Any]) -> list[str]:
    """The cells of one comparison, as COMPARED."""
    low, mean, high = pair["difference"]
    return [
        pair["ours"],
        pair["other"],
        f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]",
        figure(pair["kl_ratio"], 2),
        pair["verdict"],
        figure(pair["cpu_ratio"], 2),
        figure(pair["memory_ratio"], 2),
    ]
