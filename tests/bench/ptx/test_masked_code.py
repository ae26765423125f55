"""The code for diverged lanes must agree with the code for full batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qtrain.bench.ptx import launch
from qtrain.bench.ptx.program import Program, program
from tests.bench.ptx import device_kernels, matmul_kernels

Case = tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]


def attention() -> Case:
    q, k, v = (torch.randn(2, 100, 64).bfloat16() for _ in range(3))
    options = {"D": 64, "BM": 64, "BN": 32, "CAUSAL": True}
    return matmul_kernels.attention, (2, 2), (q, k, v, torch.zeros_like(q), 100, 0.125), options


def matmul() -> Case:
    a, b, c = torch.randn(97, 100).bfloat16(), torch.randn(100, 70).bfloat16(), torch.zeros(97, 70)
    sizes = (97, 70, 100, 100, 1, 70, 1, 70, 1)
    return matmul_kernels.matmul, (2, 2), (a, b, c, *sizes), {"BM": 64, "BN": 64, "BK": 32, "MASK": True}


def layernorm() -> Case:
    x, w = torch.randn(9, 500), torch.randn(500)
    return device_kernels.layernorm, (9,), (x, w, w.clone(), torch.zeros(9, 500), 500, 1e-5), {"B": 128}


def sort_scan() -> Case:
    outputs = [torch.zeros(256) for _ in range(3)]
    outputs += [torch.zeros(size, dtype=torch.int32) for size in (1, 16)]
    return device_kernels.sort_scan, (1,), (torch.rand(256), *outputs), {"B": 256}


def dropout() -> Case:
    return device_kernels.dropout, (3,), (torch.rand(256), torch.zeros(256), 5, 0.5, 256), {"B": 128}


def atomics() -> Case:
    index, count = torch.randint(0, 5, (256,), dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    arguments = (torch.rand(256), index, torch.zeros(5), torch.zeros(5), count, 256)
    return device_kernels.atomics, (2,), arguments, {"B": 128}


@pytest.mark.parametrize("case", [attention, matmul, layernorm, sort_scan, dropout, atomics])
def test_masked_code(case: Callable[[], Case], monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, grid, args, options = case()
    copies = [value.clone() if isinstance(value, torch.Tensor) else value for value in args]
    full = launch(kernel, grid, *args, **options).as_dict()
    compile_block = Program.compile
    compiled = []

    def only_masked(self: Program, block: Any, masked: bool) -> Any:
        function = compile_block(self, block, True)
        compiled.append(block.index)
        block.fast = lambda registers, state, memory, _: function(registers, state, memory, state.everyone)
        return function if masked else block.fast

    monkeypatch.setattr(Program, "compile", only_masked)
    program.cache_clear()
    under_masks = launch(kernel, grid, *copies, **options).as_dict()
    program.cache_clear()
    assert compiled
    for value, copy in zip(args, copies, strict=True):
        assert not isinstance(value, torch.Tensor) or torch.equal(value, copy)
    del full["seconds"], under_masks["seconds"]
    assert full == under_masks
