"""From the samples of the training benchmark to long-form rows, and from those to a table's cells."""

from __future__ import annotations

from typing import Any

from .statistics import Runs, median, noise_floor, percentile, ratio_of_medians
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
    baseline = good[BASELINE]
    memory = median(_added(baseline)) / median(_added(group))
    if group is baseline:
        return {"speedup": [1.0, 1.0, 1.0], "memory_ratio": 1.0, "verdict": "baseline"}
    speedup, verdict = _compare(baseline, group, floor, seed)
    return {"speedup": speedup, "memory_ratio": memory, "verdict": verdict}


def _compare(
    other: list[dict[str, Any]], group: list[dict[str, Any]], floor: float | None, seed: int
) -> tuple[list[float | None], str]:
    """How many times as long `other` takes, [low, estimate, high], and the verdict.

    Between-process luck is invisible in one process, so that then there is neither interval nor verdict.
    """
    time = ratio_of_medians(_epoch_cpu(other), _epoch_cpu(group), seed=seed)
    if min(len(other), len(group)) < 2:
        return [None, time.estimate, None], "one process each"
    if floor is None:
        return [time.low, time.estimate, time.high], "noise not measured"
    verdict = {"more": "faster", "less": "slower"}.get(time.verdict(floor), "no difference")
    return [time.low, time.estimate, time.high], verdict


def against_best_peer(samples: list[dict[str, Any]], task: str, dtype: str, *, seed: int) -> str | None:
    """One line: our default, not our quickest, beside the quickest of the peers, dtype for dtype.

    None where one side has no variant that passed.
    """
    good: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        if (sample["task"], sample["dtype"]) == (task, dtype) and sample["name"] != AGAIN:
            good.setdefault(sample["name"], []).append(sample)
    passed = [group for group in good.values() if _status(group) == "ok"]
    order = [variant.name for variant in variants(task)]
    ours = sorted(
        (group for group in passed if group[0]["worker"] == "ours"),
        key=lambda group: order.index(group[0]["name"]),
    )
    peers = [group for group in passed if group[0]["worker"] != "ours"]
    if not ours or not peers:
        return None
    mine, theirs = ours[0], min(peers, key=lambda group: median(_epoch_cpu(group)))
    rows = long_rows([sample for sample in samples if sample["task"] == task], seed=seed)
    floor = next((row["noise_floor"] for row in rows), None)
    speedup, verdict = _compare(theirs, mine, floor, seed)
    return (
        f"{task}, {dtype}: {theirs[0]['name']} takes {_interval(speedup)} times the CPU time of "
        f"{mine[0]['name']} and {median(_added(theirs)) / median(_added(mine)):.1f} times the memory "
        f"({verdict}; noise floor {'not measured' if floor is None else f'{floor:.0%}'})"
    )


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


def _interval(speedup: list[float | None] | None) -> str:
    if speedup is None:
        return "–"
    low, estimate, high = speedup
    interval = "" if low is None or high is None else f" [{low:.2f}, {high:.2f}]"
    return f"{figure(estimate, 2)}{interval}"
