"""From the samples of the training benchmark to long-form rows, and from those to a table's cells."""

from __future__ import annotations

from typing import Any

from .statistics import Ratio, Runs, median, noise_floor, percentile, ratio_of_medians
from .table import Column, figure
from .variants import AGAIN, BASELINE, OURS, variants

MIB = 1 << 20

COLUMNS = (
    Column("variant", numeric=False),
    Column("dtype", numeric=False),
    Column("CPU s / step"),
    Column("reference, once"),
    Column("CPU s, one epoch"),
    Column("wall s / step"),
    Column("MiB added"),
    Column("first loss"),
    Column("TRL time / its time [95 %]"),
    Column("TRL MiB / its MiB"),
    Column("status", numeric=False),
)


def long_rows(samples: list[dict[str, Any]], *, seed: int) -> list[dict[str, Any]]:
    """One row per task and variant, in the order of the variants; figures only where the gate was passed.

    A variant is `ok` when all of its processes are; otherwise the first other status stands.
    """
    rows = []
    for task in dict.fromkeys(sample["task"] for sample in samples):
        mine = [sample for sample in samples if sample["task"] == task]
        groups = {
            variant.name: group
            for variant in variants(task)
            if (group := [sample for sample in mine if sample["name"] == variant.name])
        }
        good = {name: group for name, group in groups.items() if _status(group) == "ok"}
        floor = None
        if OURS in good and AGAIN in good:
            floor = noise_floor(_epoch_cpu(good[OURS]), _epoch_cpu(good[AGAIN]), seed=seed)
        for name, group in groups.items():
            row = {key: group[0][key] for key in ("task", "name", "worker", "dtype", "options")}
            row |= {"status": _status(group), "noise_floor": floor}
            if name in good:
                row |= _figures(group) | _against(good, group, floor, seed)
            rows.append(row)
    return rows


def _status(group: list[dict[str, Any]]) -> str:
    return next((sample["status"] for sample in group if sample["status"] != "ok"), "ok")


def _runs(group: list[dict[str, Any]], field: str) -> Runs:
    """Timed steps by process, without the warm-up step."""
    return [[step[field] for step in sample["result"]["steps"][1:]] for sample in group]


def _reference(sample: dict[str, Any]) -> float:
    cost = sample["result"]["reference"]
    return 0.0 if cost is None else float(cost["cpu_s"])


def _epoch_cpu(group: list[dict[str, Any]]) -> Runs:
    """CPU seconds of a batch in a run of one epoch: its step, and its reference pass where that is apart."""
    return [
        [cpu + _reference(sample) for cpu in run]
        for sample, run in zip(group, _runs(group, "cpu_s"), strict=True)
    ]


def _added(group: list[dict[str, Any]]) -> Runs:
    return [[(s["result"]["peak_bytes"] - s["result"]["baseline_bytes"]) / MIB] for s in group]


def _figures(group: list[dict[str, Any]]) -> dict[str, Any]:
    cpu = _runs(group, "cpu_s")
    apart = group[0]["result"]["reference"] is not None
    return {
        "n": sum(len(run) for run in cpu),
        "cpu_s_p05": percentile(cpu, 5),
        "cpu_s_p50": median(cpu),
        "cpu_s_p95": percentile(cpu, 95),
        "reference_cpu_s": median([[_reference(sample)] for sample in group]) if apart else None,
        "epoch_cpu_s_p50": median(_epoch_cpu(group)),
        "wall_s_p50": median(_runs(group, "wall_s")),
        "added_mib_p50": median(_added(group)),
        "loaded_mib": median([[sample["result"]["baseline_bytes"] / MIB] for sample in group]),
        "first_loss": group[0]["result"]["logs"][0]["loss"],
        "settings": group[0]["result"]["settings"],
        "versions": group[0]["result"]["versions"],
    }


def _against(
    good: dict[str, list[dict[str, Any]]], group: list[dict[str, Any]], floor: float | None, seed: int
) -> dict[str, Any]:
    """Ratios to the baseline, > 1 where this variant needs less."""
    if BASELINE not in good:
        return {}
    time = ratio_of_medians(_epoch_cpu(good[BASELINE]), _epoch_cpu(group), seed=seed)
    memory = median(_added(good[BASELINE])) / median(_added(group))
    if group is good[BASELINE]:
        return {"speedup": [1.0, 1.0, 1.0], "memory_ratio": 1.0, "verdict": "baseline"}
    verdict = {"more": "faster", "less": "slower"}.get(time.verdict(floor or 0.0), "no difference")
    return {"speedup": [time.low, time.estimate, time.high], "memory_ratio": memory, "verdict": verdict}


def cells(row: dict[str, Any]) -> list[str]:
    """The cells of one table row, as COLUMNS."""
    if row["status"] != "ok":
        return [row["name"], row["dtype"], *["–"] * 8, row["status"]]
    return [
        row["name"],
        row["dtype"],
        figure(row["cpu_s_p50"], 2),
        figure(row["reference_cpu_s"], 2),
        figure(row["epoch_cpu_s_p50"], 2),
        figure(row["wall_s_p50"], 2),
        figure(row["added_mib_p50"], 0),
        figure(row["first_loss"], 4),
        _interval(row.get("speedup")),
        figure(row.get("memory_ratio")),
        row.get("verdict", "ok"),
    ]


def _interval(speedup: list[float] | None) -> str:
    if speedup is None:
        return "–"
    ratio = Ratio(*speedup)
    return f"{ratio.estimate:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
