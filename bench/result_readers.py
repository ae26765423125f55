"""The rows of the benchmarks that have a form of their own: kernels, train, quantizers, cards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from .result_checks import AtLeastZero, Checked, Positive, Samples, each, figure, make_row
from .results import MEMORY, OK, TIME, Figure, Row
from .statistics import Runs


def kernel_rows(report: Mapping[str, Any]) -> Iterator[Row]:
    """Of `bench kernels`."""
    for row in each(KernelRow, report["rows"]):
        figures = []
        if row.status == OK:
            figures.append(figure(TIME, [row.samples_s or []]))
            if row.peak_bytes is not None:
                figures.append(figure(MEMORY, [[float(row.peak_bytes)]]))
        shape = {"model": row.model, "part": row.part, "base": row.base, "M": row.rows or ""}
        shape |= {"N": "N " + "+".join(str(n) for n in row.columns), "K": row.inner}
        yield make_row(
            "kernels", row.op, row.variant, row.phase, row.dtype, shape, row.status, figures,
            noise_floor=row.noise_floor, flops=row.flops, ideal_bytes=row.ideal_bytes,
            roofline_share=row.roofline_share, details={"roofline_s": row.roofline_s, "errors": row.errors},
        )  # fmt: skip


class KernelRow(Checked):
    """A row as `kernel_run` writes it; samples where the status is `ok`."""

    op: str
    model: str
    part: str
    base: str
    dtype: str
    rows: int
    columns: list[int]
    inner: int
    phase: str = Field(alias="pass")
    variant: str
    status: str
    flops: AtLeastZero
    ideal_bytes: AtLeastZero
    noise_floor: AtLeastZero | None = None
    samples_s: Samples | None = None
    peak_bytes: int | None = None
    roofline_s: Positive | None = None
    roofline_share: AtLeastZero | None = None
    errors: dict[str, float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _timed(self) -> KernelRow:
        if self.status == OK and self.samples_s is None:
            raise ValueError("samples_s: a row whose status is ok has samples")
        return self


class Cost(Checked):
    """Of a step or a pass."""

    cpu_s: AtLeastZero
    wall_s: AtLeastZero


class TrainResult(Checked):
    """What a worker measured; the first step warms up."""

    steps: Annotated[list[Cost], Field(min_length=2)]
    reference: Cost | None
    baseline_bytes: int
    peak_bytes: int
    logs: list[dict[str, Any]]


class TrainSummary(Checked):
    """What the benchmark made of all processes of a variant."""

    task: str
    name: str
    noise_floor: AtLeastZero | None = None


class TrainSample(Checked):
    """One process."""

    task: str
    name: str
    dtype: str
    worker: str
    status: str
    result: TrainResult | None = None


def train_rows(report: Mapping[str, Any]) -> Iterator[Row]:
    """Of `bench train`: one for each task and variant, ok where all of its processes are.

    `time` is what a batch costs in a run of one epoch: its step, and its reference pass where that is apart.
    """
    samples = list(each(TrainSample, report["samples"], "samples"))
    summaries = list(each(TrainSummary, report.get("rows") or []))
    stated = [(row.task, row.name) for row in summaries]
    floors = {(row.task, row.name): row.noise_floor for row in summaries}
    names = dict.fromkeys((sample.task, sample.name) for sample in samples)
    for name in sorted(names, key=lambda one: stated.index(one) if one in stated else len(stated)):
        mine = [sample for sample in samples if (sample.task, sample.name) == name]
        status = next((sample.status for sample in mine if sample.status != OK), OK)
        results = [sample.result for sample in mine if sample.result is not None]
        figures = _train_figures(results) if status == OK and results else []
        loss = results[0].logs[0].get("loss") if results and results[0].logs else None
        yield make_row(
            "train", mine[0].task, mine[0].name, "step", mine[0].dtype, {}, status, figures,
            noise_floor=floors.get(name), details={"first loss": loss, "worker": mine[0].worker},
        )  # fmt: skip


def _train_figures(results: list[TrainResult]) -> list[Figure]:
    def by_process(value: Callable[[TrainResult, Cost], float]) -> Runs:
        return [[value(result, step) for step in result.steps[1:]] for result in results]

    def reference(result: TrainResult) -> float:
        return result.reference.cpu_s if result.reference else 0.0

    return [
        figure(TIME, by_process(lambda result, step: step.cpu_s + reference(result))),
        figure("wall time", by_process(lambda _, step: step.wall_s)),
        figure(MEMORY, [[float(result.peak_bytes - result.baseline_bytes)] for result in results]),
    ]


class QuantizerCost(Checked):
    """Of one export."""

    cpu_s: Positive
    wall_s: Positive
    baseline_bytes: int
    peak_bytes: int


class QuantizerScore(Checked):
    """By held-out window."""

    kl: list[AtLeastZero]


class QuantizerSample(Checked):
    """One export."""

    name: str
    group_size: int
    result: QuantizerCost | None = None
    score: QuantizerScore | None = None


class QuantizerRow(Checked):
    """What the benchmark made of all exports of a quantizer; figures where the status is `ok`."""

    op: str
    name: str
    bits: int
    group_size: int
    symmetric: bool
    status: str
    kl: AtLeastZero | None = None
    kl_low: AtLeastZero | None = None
    kl_high: AtLeastZero | None = None
    perplexity: Positive | None = None
    perplexity_16_bit: Positive | None = None
    top1: AtLeastZero | None = None
    bits_per_weight: Positive | None = None
    file_bytes: Positive | None = None


def quantizer_rows(report: Mapping[str, Any]) -> Iterator[Row]:
    """Of `bench quantizers`; the interval of KL is over the held-out windows."""
    samples = list(each(QuantizerSample, report.get("samples") or [], "samples"))
    for row in each(QuantizerRow, report["rows"]):
        mine = [one for one in samples if (one.name, one.group_size) == (row.name, row.group_size)]
        costs = [one.result for one in mine if one.result is not None]
        windows = next((tuple(one.score.kl) for one in mine if one.score is not None), ())
        figures = _quality(row) + _export_costs(costs) if row.status == OK else []
        shape = {"group_size": row.group_size, "symmetry": "symmetric" if row.symmetric else "asymmetric"}
        details = row.model_dump(exclude_none=True) | {"KL by window": windows}
        yield make_row(
            "quantizers", row.op, row.name, "", f"{row.bits}-bit", shape, row.status, figures, details=details
        )


def _quality(row: QuantizerRow) -> list[Figure]:
    values = {
        "perplexity": row.perplexity,
        "top-1 agreement": row.top1,
        "bits per weight": row.bits_per_weight,
        "size": row.file_bytes,
    }
    found = [figure(name, [[value]]) for name, value in values.items() if value is not None]
    if row.kl is None:
        return found
    known = row.kl_low is not None and row.kl_high is not None
    interval = (row.kl_low or 0.0, row.kl_high or 0.0) if known else None
    return [figure("KL", [[row.kl]], interval=interval), *found]


def _export_costs(costs: list[QuantizerCost]) -> list[Figure]:
    if not costs:
        return []
    return [
        figure("CPU time", [[cost.cpu_s] for cost in costs]),
        figure("wall time", [[cost.wall_s] for cost in costs]),
        figure(MEMORY, [[float(cost.peak_bytes - cost.baseline_bytes)] for cost in costs]),
    ]


class Emulated(Checked):
    """What the report needs of `cards_emulated`."""

    shape: dict[str, int]
    ideal_bytes: Positive
    touched_bytes: Positive
    flops: AtLeastZero
    bound: str
    overlapped_us: Positive
    serial_us: Positive
    roofline_us: AtLeastZero


class CardRow(Checked):
    """What the report needs of `cards`."""

    specimen: str
    kernel: str
    arch: int
    registers: int
    spill_stores: int
    spill_loads: int
    shared_bytes: int
    occupancy: float
    other_per_mma: float | None
    over_budget: list[str] = Field(default_factory=list)
    emulated: Emulated | None = None


def card_rows(report: Mapping[str, Any]) -> Iterator[Row]:
    """Of `bench cards`: no time, unless modelled."""
    for card in each(CardRow, report["cards"], "cards"):
        values = {
            "registers": (float(card.registers), ""),
            "spills": (float(card.spill_stores + card.spill_loads), "instructions"),
            "shared memory": (float(card.shared_bytes), "bytes"),
        }
        seen = card.emulated
        if seen is not None:
            values["modelled time"] = (seen.overlapped_us / 1e6, "s")
        figures = [figure(name, [[value]], unit, "less") for name, (value, unit) in values.items()]
        yield make_row(
            "cards", card.kernel, card.specimen, "", "", {"sm": card.arch}, OK, figures,
            flops=None if seen is None else seen.flops,
            ideal_bytes=None if seen is None else seen.ideal_bytes,
            roofline_share=None if seen is None else seen.roofline_us / seen.overlapped_us,
            details=card.model_dump(),
        )  # fmt: skip


READERS: dict[str, Callable[[Mapping[str, Any]], Iterator[Row]]] = {
    "kernels": kernel_rows,
    "train": train_rows,
    "quantizers": quantizer_rows,
    "cards": card_rows,
}
