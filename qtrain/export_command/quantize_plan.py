"""What `--dry-run` says: sizes to the byte, memory and time by what was measured."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from qtrain.export.assemble import planned_specs
from qtrain.export.disk import free_bytes, size_text
from qtrain.export.layerwise import bytes_per_token

from .verdict import say

if TYPE_CHECKING:
    from .quantize import Job

# Measured on SmolLM2-135M with one thread (docs/export.md says how): the share of a plain product's rate
# that a layer reaches, and what rounding a weight and refining it once more take besides products.
EFFICIENCY = 0.6
ROUNDING, REFINING = 9e-8, 9e-8  # seconds a weight
DISK = 3e8  # bytes read, cast, hashed and written in a second
IMPORTS = 900 * 2**20  # bytes: torch, transformers and what is read of the rows
SLICES = 6  # copies of a slice of rows, in float32, that rounding holds


def show_plan(job: Job, console: Console) -> None:
    """Print what would be written, where, and what it takes."""
    specs = planned_specs(job.weights, job.schemes, job.settings.container)
    size, was = sum(spec.nbytes for spec in specs), job.weights.checkpoint.nbytes
    packed = [module for module, scheme in job.schemes.items() if scheme is not None]
    kept = [module for module, scheme in job.schemes.items() if scheme is None]
    adapter = job.weights.adapter
    calibration = job.calibration
    seconds = estimate_seconds(job)
    lines = [
        f"base: {job.source.base} ({size_text(was)}), {job.weights.base}",
        "adapter: none" if adapter is None else f"adapter: {adapter.folder}, {len(adapter.shapes)} modules",
        f"calibration: {calibration.windows.shape[0]} windows of {calibration.windows.shape[1]} tokens "
        f"from {calibration.source}; the gate: {len(job.held_out.ids)} rows",
        f"writes: {job.out}, {size_text(size)} ({size:,} bytes of tensors, {size / was:.0%} of the base); "
        f"{size_text(free_bytes(job.out))} are free there, the journal needs about as much until it is done",
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
    """Bytes at the worst moment: a layer, its states, its widest module being rounded."""
    structure, compute = job.structure, job.compute
    shapes = _layer_shapes(job)
    weights = sum(rows * columns for rows, columns in shapes)
    hidden = structure.model.config.hidden_size
    tokens = job.calibration.tokens
    models = 2 if job.settings.stage.correction else 1  # the original model runs beside
    states = 3 * models * tokens * hidden * compute.dtype.itemsize  # before, behind, and a child's
    states = 0 if compute.spills(structure, tokens, models) else states
    at_once = compute.windows_at_once(structure, job.calibration.windows.shape[1])
    chunk = min(tokens, at_once * job.calibration.windows.shape[1])
    forward = chunk * bytes_per_token(structure, compute.dtype)
    widest = max(columns for _, columns in shapes)
    slices = max(min(rows, 4096) * columns for rows, columns in shapes)
    rounding = 2 * 4 * widest**2 + SLICES * 4 * slices
    # one chunk is inside of the layer while its modules are rounded
    work = forward + rounding if chunk == tokens else max(forward + 4 * widest**2, rounding)
    return IMPORTS + weights * compute.dtype.itemsize + weights // 2 + states + work


def estimate_seconds(job: Job) -> float:
    """Of products (forward, sums, feedback, the gate) at the rate measured here, of rounding, of the disk."""
    shapes, tokens = _layer_shapes(job), job.calibration.tokens
    weights = sum(rows * columns for rows, columns in shapes)
    stages: dict[int, int] = {}
    for stage in job.structure.stages:
        columns = job.structure.layer(0).get_submodule(stage.linears[0]).in_features
        stages[columns] = stages.get(columns, 0) + 1
    forward = 2.0 * tokens * weights * (2 if job.settings.stage.correction else 1)
    at_once = job.compute.windows_at_once(job.structure, job.calibration.windows.shape[1])
    if at_once < job.calibration.windows.shape[0]:
        forward *= 2.5  # every stage runs the layer up to itself; finished attention is kept
    sums = sum(count * 1.25 * tokens * columns**2 for columns, count in stages.items())
    refine = job.settings.stage.refine if job.settings.stage.rounding == "gptq" else 0
    feedback = sum(2.0 * rows * columns**2 for rows, columns in shapes) * (1 + refine)
    rate = product_rate(job.compute.device) * EFFICIENCY
    threads = torch.get_num_threads() if job.compute.device.type == "cpu" else 1
    rounding = weights * (ROUNDING + REFINING * refine) / threads
    layers = job.structure.count * ((forward + sums + feedback) / rate + rounding)
    head = job.structure.model.config.vocab_size * job.structure.model.config.hidden_size
    measured = sum(map(len, job.held_out.ids))
    gate = 2 * 2.0 * measured * (weights * job.structure.count + head) / rate
    return layers + gate + 2 * job.weights.checkpoint.nbytes / DISK


def product_rate(device: torch.device, size: int = 1024, times: int = 5) -> float:
    """Operations a second of a float32 product of `size`, the best of some."""
    a = torch.ones(size, size, device=device)
    best = float("inf")
    for _ in range(times):
        begun = time.perf_counter()
        float((a @ a)[0, 0])  # reading a value waits for the device
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best


def _layer_shapes(job: Job) -> list[tuple[int, int]]:
    layer = job.structure.layer(0)
    modules = [layer.get_submodule(name) for stage in job.structure.stages for name in stage.linears]
    return [(module.out_features, module.in_features) for module in modules]


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
