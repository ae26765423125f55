"""What `--dry-run` says: sizes to the byte, memory and time by what was measured."""

from __future__ import annotations

import time

import torch
from rich.console import Console
from torch import nn

from qtrain.export.assemble import planned_specs
from qtrain.export.disk import free_bytes, size_text
from qtrain.export.planned_cost import PlannedCost, planned_cost
from qtrain.export.structure import linear

from .quantize_job import Job
from .verdict import say

# Measured on SmolLM2-135M (docs/export.md says how): the share of a plain product's rate
# that a layer reaches, and what rounding a weight and refining it once more take besides products.
EFFICIENCY = 0.7
ROUNDING, REFINING = 9e-8, 9e-8  # seconds a weight
DISK = 3e8  # bytes read, cast, hashed and written in a second
TORCH = 300 * 2**20  # bytes of torch's import


def show_plan(job: Job, console: Console) -> None:
    """Print what would be written, where, and what it takes."""
    specs = planned_specs(job.weights, job.schemes, job.settings.container)
    size, was = sum(spec.nbytes for spec in specs), job.weights.checkpoint.nbytes
    packed = [module for module, scheme in job.schemes.items() if scheme is not None]
    kept = [module for module, scheme in job.schemes.items() if scheme is None]
    packed_bytes = sum(spec.nbytes for spec in specs if spec.name not in job.weights.checkpoint.specs)
    adapter = job.weights.adapter
    calibration = job.calibration
    seconds = estimate_seconds(job)
    lines = [
        f"base: {job.source.base} ({size_text(was)}), {job.weights.base}",
        "adapter: none" if adapter is None else f"adapter: {adapter.folder}, {len(adapter.shapes)} modules",
        f"calibration: {calibration.windows.shape[0]} windows of {calibration.windows.shape[1]} tokens "
        f"from {calibration.source}; the gate: {len(job.held_out.ids)} rows",
        f"writes: {job.out}, {size_text(size)} ({size:,} bytes of tensors, {size / was:.0%} of the base); "
        f"{size_text(free_bytes(job.out))} are free there, its journal takes {size_text(packed_bytes)} more "
        "until it is done",
        f"packed: {len(packed)} modules as {job.settings.container}; "
        f"in 16 bits: {_names(kept)}embedding, norms{'' if 'lm_head' in packed else ', lm_head'}",
        f"peak memory: about {size_text(estimate_memory(job))}",
        f"time: about {_duration(seconds)} on {job.compute.device} "
        f"({torch.get_num_threads()} threads; by the rate of products here, measured now)",
        "nothing was written",
    ]
    for line in lines:
        say(console, line)


def estimate_memory(job: Job) -> int:
    """Bytes at the worst moment: in a layer being quantised, or in the gate's widest module."""
    hidden = job.structure.model.config.hidden_size
    widest = max(module.weight.numel() for module in _linears(job))
    measured = sum(map(len, job.held_out.ids))
    states = 4 * measured * (3 * hidden + 3 * max(its.out_features for its in _linears(job)))
    return TORCH + max(_cost(job).peak_bytes, 2 * 4 * widest + states)


def estimate_seconds(job: Job) -> float:
    """Of products (layers, the gate) at the rates measured here, of rounding, of the disk."""
    weights = sum(module.weight.numel() for module in _linears(job)) * job.structure.count
    refine = job.settings.stage.refine if job.settings.stage.rounding == "gptq" else 0
    rate = product_rate(job.compute.device) * EFFICIENCY
    forward_rate = product_rate(job.compute.device, job.compute.dtype) * EFFICIENCY
    rounding = weights * (ROUNDING + REFINING * refine)
    config = job.structure.model.config
    measured = sum(map(len, job.held_out.ids))
    gate = 2 * 2.0 * measured * (weights + config.vocab_size * config.hidden_size)
    cost = _cost(job)
    products = cost.forward / forward_rate + (cost.exact + gate) / rate
    return products + rounding + 2 * job.weights.checkpoint.nbytes / DISK


def _cost(job: Job) -> PlannedCost:
    count, length = job.calibration.windows.shape
    return planned_cost(job.structure, count, length, job.settings.stage, job.compute)


def _linears(job: Job) -> list[nn.Linear]:
    """Of one layer."""
    layer = job.structure.layer(0)
    return [linear(layer, name) for stage in job.structure.stages for name in stage.linears]


def product_rate(
    device: torch.device, dtype: torch.dtype = torch.float32, size: int = 1024, times: int = 5
) -> float:
    """Operations a second of a product of `size`, the best of some."""
    a = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(times):
        begun = time.perf_counter()
        float((a @ a)[0, 0])  # reading a value waits for the device
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best


def _names(modules: list[str]) -> str:
    if not modules:
        return ""
    shown = ", ".join(modules[:3])
    more = f" and {len(modules) - 3} more" if len(modules) > 3 else ""
    return f"{shown}{more}, "


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
