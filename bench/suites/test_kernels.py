"""Every op beside its baselines under pytest-benchmark: `pytest bench/suites/test_kernels.py -k lora_linear`.

Cases, variants and the correctness gate are those of `qtrain bench kernels`, which adds cold caches, random
order, intervals and provenance. Wall-clock time, hot caches; a variant whose results are wrong is not timed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from ..kernel_data import make_data
from ..kernel_gate import expected
from ..kernel_run import Bench, prepare, timed
from ..kernel_shapes import OPS, QUICK_MODELS, Case, cases
from ..kernel_timing import Plan, make_device
from ..kernel_variants import variants_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = 128
ROUNDS = 30 if DEVICE == "cuda" else 5
PLAN = Plan(least=ROUNDS, most=ROUNDS, warm_up=1, budget_s=60, cold=False, seed=0)
CASES = [case for case in cases(OPS, QUICK_MODELS, [ROWS], "bf16", quick=True) if case.base != "16-bit"]
CASES += list(cases(["linear_logprob"], QUICK_MODELS, [ROWS], "bf16", quick=True))


def _name(case: Case) -> str:
    return f"{case.op} {case.model} {case.part} M {case.rows}"


@pytest.fixture(scope="module")
def inputs() -> dict[str, Any]:
    """Of the case that is being timed: the tests come case by case."""
    return {}


def _points() -> list[Any]:
    return [
        pytest.param(case, variant.name, which, id=f"{_name(case)} {which} {variant.name}")
        for case in CASES
        for which in case.passes
        for variant in variants_of(case, DEVICE)
        if not variant.name.endswith("(again)")
    ]


@pytest.mark.parametrize(("case", "name", "which"), _points())
def test_op(benchmark: Any, inputs: dict[str, Any], case: Case, name: str, which: str) -> None:
    if inputs.get("name") != _name(case):
        data = make_data(case, torch.device(DEVICE), PLAN.seed)
        inputs.clear()
        inputs.update(name=_name(case), data=data, target=expected(case, data))
    bench = Bench(DEVICE, make_device(DEVICE, wall=True), "wall", PLAN, None, bool)
    variant = next(its for its in variants_of(case, DEVICE) if its.name == name)
    operation, errors, status = prepare(case, inputs["data"], inputs["target"], variant, bench)
    if operation is None:
        if status.startswith("wrong"):
            pytest.fail(status)
        pytest.skip(status)
    it = timed(case, which, operation)
    if it is None:
        pytest.skip(f"has no {which} of its own")
    benchmark.group = f"{_name(case)} {which}"
    benchmark.extra_info |= {
        "variant": name,
        "flops": case.flops(which),
        "ideal_bytes": case.ideal_bytes(which),
        "errors": errors,
    }
    prepared = partial(_arguments, it.prepare)
    benchmark.pedantic(partial(_finished, it.run), setup=prepared, rounds=ROUNDS, warmup_rounds=1)


def _arguments(setup: Any) -> tuple[tuple[Any], dict[str, Any]]:
    found = setup()
    _wait()
    return (found,), {}


def _finished(run: Any, state: Any) -> Any:
    found = run(state)
    _wait()
    return found


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
