"""One case from inputs to rows: build, gate, time side by side, compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .kernel_data import Data, make_data
from .kernel_gate import Expected, check, check_dropout, errors, expected
from .kernel_roofline import Rates, roofline_seconds
from .kernel_shapes import Case
from .kernel_timing import OK, OUT_OF_MEMORY, Device, Plan, Samples, Timed, attempt, sample
from .kernel_variants import Operation, Variant, variants_of
from .measure import memory_field
from .statistics import median, noise_floor, percentile, ratio_of_medians
from .variants import AGAIN, OURS

MEMINFO = Path("/proc/meminfo")
SPARE = 0.8  # of the free memory of a machine without a GPU may be asked for

Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """Where and how cases are run."""

    kind: str  # cpu or cuda
    device: Device
    clock: str  # what its seconds are, in words
    plan: Plan
    rates: Rates | None
    wanted: Callable[[str], bool]  # by the variant's name


def run_case(case: Case, bench: Bench) -> Iterator[Row]:
    """A row for each pass and variant, in the variants' order."""
    variants = [v for v in variants_of(case, bench.kind) if bench.wanted(v.name)]
    device = torch.device(bench.kind)
    data, status = attempt(partial(make_data, case, device, bench.plan.seed))
    target, status = attempt(partial(expected, case, data)) if data is not None else (None, status)
    if data is None or target is None:
        for which in case.passes:
            yield from _rows(case, which, bench, dict.fromkeys(_names(variants), Samples(status=status)), {})
        return
    operations: dict[str, Operation] = {}
    failures: dict[str, Samples] = {}
    gate_errors: dict[str, dict[str, float]] = {}
    for variant in variants:
        operation, found, status = prepare(case, data, target, variant, bench)
        gate_errors[variant.name] = found
        if operation is None:
            failures[variant.name] = Samples(status=status)
        else:
            operations[variant.name] = operation
    for which in case.passes:
        ready = {name: timed(case, which, operation) for name, operation in operations.items()}
        possible = {name: one for name, one in ready.items() if one is not None}
        samples = failures | sample(bench.device, possible, bench.plan)
        shown = {name: samples[name] for name in _names(variants) if name in samples}
        yield from _rows(case, which, bench, shown, gate_errors)


def _names(variants: list[Variant]) -> list[str]:
    return [variant.name for variant in variants]


def prepare(
    case: Case, data: Data, target: dict[str, Expected], variant: Variant, bench: Bench
) -> tuple[Operation | None, dict[str, float], str]:
    """(operation, errors by result, `ok`), or (None, errors, why it is not timed)."""
    reason = variant.missing(bench.kind) or _too_large(case, variant, bench.kind)
    if reason is not None:
        return None, {}, reason
    plain, status = attempt(partial(variant.build, case, data, 0.0))
    found, status = attempt(partial(_results, plain)) if plain is not None else (None, status)
    if found is None:
        return None, {}, status
    sizes, reason = errors(target, found), check(case, target, found)
    if reason is not None or not case.lora:
        return (plain if reason is None else None), sizes, reason or OK
    del plain, found
    dropping, status = attempt(partial(variant.build, case, data, case.dropout_p))
    found, status = attempt(partial(_results, dropping)) if dropping is not None else (None, status)
    if found is None:
        return None, sizes, status
    reason = check_dropout(case, target, found)
    return (dropping if reason is None else None), sizes, reason or OK


def _too_large(case: Case, variant: Variant, kind: str) -> str | None:
    """A CPU's allocator does not refuse, the system kills: so what is known to be large is not begun."""
    needed = variant.needs(case)
    if kind == "cpu" and needed > SPARE * available_bytes():
        return f"{OUT_OF_MEMORY}: needs about {needed / 2**30:.0f} GiB"
    return None


def available_bytes() -> int:
    """Memory that this machine can still give."""
    return memory_field("MemAvailable", MEMINFO.read_text())


def _results(operation: Operation) -> dict[str, Tensor]:
    """Results and gradients by name."""
    outputs = operation.forward()
    found = {
        name: value.detach() for name, value in zip(operation.names, outputs, strict=True) if name is not None
    }
    if operation.leaves:
        found |= dict(zip(operation.gradients, operation.backward(outputs), strict=True))
    return found


def timed(case: Case, which: str, operation: Operation) -> Timed | None:
    """What a sample of the pass is; None if the variant has no such pass."""
    if which == "backward":
        return Timed(operation.forward, operation.backward)
    if which == "forward+backward":
        return Timed(_nothing, lambda _: operation.backward(operation.forward()))
    if case.lora:  # as in training: what is saved for the backward is part of it
        return Timed(_nothing, lambda _: operation.forward())
    if all(name is None for name in operation.names):
        return None

    def alone(_: None) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return operation.forward()

    return Timed(_nothing, alone)


def _nothing() -> None:
    """There is nothing to prepare."""


def _rows(
    case: Case,
    which: str,
    bench: Bench,
    samples: dict[str, Samples],
    gate_errors: dict[str, dict[str, float]],
) -> Iterator[Row]:
    flops, moved = case.flops(which), case.ideal_bytes(which)
    seed = bench.plan.seed
    good = {name: [one.seconds] for name, one in samples.items() if one.seconds}
    floor = noise_floor(good[OURS], good[AGAIN], seed=seed) if {OURS, AGAIN} <= good.keys() else None
    for name, one in samples.items():
        row: Row = asdict(case) | {
            "pass": which,
            "variant": name,
            "status": one.status,
            "flops": flops,
            "ideal_bytes": moved,
            "errors": gate_errors.get(name, {}),
            "noise_floor": floor,
        }
        if one.seconds:
            row |= _figures(one, flops, moved) | _against(name, good, floor, seed)
            if bench.rates is not None:
                best = roofline_seconds(bench.rates, case.dtype, flops, moved)
                row |= {"roofline_s": best, "roofline_share": best / row["p50_s"]}
        yield row


def _figures(one: Samples, flops: float, moved: float) -> Row:
    runs = [one.seconds]
    middle = median(runs)
    return {
        "n": len(one.seconds),
        "p05_s": percentile(runs, 5),
        "p50_s": middle,
        "p95_s": percentile(runs, 95),
        "flops_per_s": flops / middle,
        "ideal_bytes_per_s": moved / middle,
        "peak_bytes": one.peak_bytes,
        "samples_s": one.seconds,
    }


def _against(name: str, good: dict[str, list[list[float]]], floor: float | None, seed: int) -> Row:
    """Time over ours, [low, estimate, high], and what this variant is beside ours."""
    if OURS not in good:
        return {}
    if name == OURS:
        return {"ratio": [1.0, 1.0, 1.0], "verdict": "baseline"}
    ratio = ratio_of_medians(good[name], good[OURS], seed=seed)
    interval = {"ratio": [ratio.low, ratio.estimate, ratio.high]}
    if name == AGAIN:
        return interval | {"verdict": "noise"}
    if floor is None:
        return interval | {"verdict": "noise not measured"}
    verdict = {"more": "slower", "less": "faster"}.get(ratio.verdict(floor), "no difference")
    return interval | {"verdict": verdict}
