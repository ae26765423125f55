"""`patched`, `launch` and `compile_for`: what unmodified host code sees."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qtrain.bench.ptx import Counters, compile_for, launch, patched, run
from tests.bench.ptx import device_kernels as kernels

ROOT = Path(__file__).resolve().parents[3]


def test_importing_it_imports_no_triton() -> None:
    code = "import sys, qtrain.bench.ptx; print([m for m in ('torch', 'triton') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "[]"


def test_patched_runs_an_ordinary_launch() -> None:
    x, y, z = torch.randn(1000), torch.randn(1000), torch.zeros(1000)
    log: list[tuple[str, Any]] = []
    with patched(log=log, racecheck=True):
        kernels.vadd[lambda args: (-(-1000 // args["B"]),)](x, y, z, 1000, B=256, num_warps=2)
    assert torch.equal(z, x + y)
    name, counters = log[0]
    assert name == "vadd"
    assert isinstance(counters, Counters)
    assert (counters.ctas, counters.threads) == (4, 64)


def test_launch_options_reach_the_compiler() -> None:
    """With enable_fp_fusion=False a product and a sum are rounded one after the other."""
    x = 1 + torch.rand(256) * 1e-3
    y = -(x.double() ** 2).float()
    separate, fused = torch.zeros(256), torch.zeros(256)
    with patched():
        kernels.multiply_add[(1,)](x, y, separate, B=256, enable_fp_fusion=False, num_warps=2, num_stages=1)
        kernels.multiply_add[(1,)](x, y, fused, B=256, enable_fp_fusion=True, num_warps=2, num_stages=1)
    assert torch.equal(separate, x * x + y)
    assert torch.equal(fused, (x.double() ** 2 + y).float())
    assert not torch.equal(separate, fused)


def test_autotuned_kernels_run_the_picked_configuration() -> None:
    x = torch.randn(1000)
    for pick, threads in ((lambda configs: configs[0], 64), (lambda configs: configs[-1], 256)):
        y, log = torch.zeros(1000), []
        with patched(log=log, pick=pick):
            kernels.tuned_scale[lambda args: (-(-1000 // args["B"]),)](x, y, 2.5, 1000)
        assert torch.equal(y, x * 2.5)
        assert log[0][1].threads == threads


def test_compile_only_runs_nothing() -> None:
    x, z, log = torch.randn(256), torch.zeros(256), []
    with patched(log=log, compile_only=True):
        kernels.vadd[(1,)](x, x, z, 256, B=256)
    assert not z.any()
    assert ".target sm_89" in log[0][1].asm["ptx"]


def test_patched_leaves_triton_as_it_was() -> None:
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    before = JITFunction.run, Autotuner.run
    with pytest.raises(ZeroDivisionError), patched():
        raise ZeroDivisionError
    assert (JITFunction.run, Autotuner.run) == before


def subtract(ptx: str) -> str:
    return re.sub(r"\badd((?:\.rn)?\.f32)", r"sub\1", ptx)


def test_an_edit_changes_what_runs() -> None:
    x, y = torch.randn(256), torch.randn(256)
    a, b, c = (torch.zeros(256) for _ in range(3))
    with patched(edit=subtract):
        kernels.vadd[(1,)](x, y, a, 256, B=256)
    launch(kernels.vadd, (1,), x, y, b, 256, B=256, edit=subtract)
    launch(kernels.vadd, (1,), x, y, c, 256, B=256)
    assert torch.equal(a, x - y)
    assert torch.equal(b, x - y)
    assert torch.equal(c, x + y)


def test_wrong_arguments_are_refused() -> None:
    x, y, z = torch.zeros(256), torch.zeros(256), torch.zeros(256)
    kernel, _, args = compile_for(kernels.vadd, (x, y, z, 256), {"B": 256}, num_warps=4)
    with pytest.raises(TypeError, match=r"9 arguments for \d parameters of vadd"):
        run(kernel, 1, [*args, 1, 2, 3, 4, 5])
    with pytest.raises(ValueError, match="requires 128 threads, not 64"):
        run(kernel, 1, args, num_warps=2)
