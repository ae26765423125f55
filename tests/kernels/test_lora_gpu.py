"""The LoRA kernels and the NF4 dequantisation launched on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qtrain.kernels import lora_linear, nf4_dequantize
from qtrain.kernels.nf4 import NF4Weight, dequantize
from tests.kernels.lora_cases import Case, assert_no_less_exact, make_case, nf4_weight, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def on_gpu(weight: NF4Weight) -> NF4Weight:
    """Every tensor of a weight moved."""
    names = ("packed", "absmax", "code", "absmax_code", "absmax_scale", "absmax_offset")
    moved = {name: tensor.cuda() for name in names if (tensor := getattr(weight, name)) is not None}
    return replace(weight, **moved)


def case_on_gpu(case: Case) -> Case:
    return replace(
        case,
        x=case.x.cuda(),
        weights=[on_gpu(w) if isinstance(w, NF4Weight) else w.cuda() for w in case.weights],
        lora_As=[a.cuda() for a in case.lora_As],
        lora_Bs=[b.cuda() for b in case.lora_Bs],
        biases=[None if bias is None else bias.cuda() for bias in case.biases],
        dys=[dy.cuda() for dy in case.dys],
    )


@pytest.mark.parametrize("base", ["nf4 nested", "nf4", "16-bit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 137, 1024, 5000])  # 5000: dequantised once
def test_no_less_exact_than_plain_products(base: str, dtype: torch.dtype, rows: int) -> None:
    case = make_case(rows, [896], 1024, [64], base=base, dtype=dtype, dropout_p=0.05)
    found = {name: value.cpu() for name, value in run(case_on_gpu(case)).items()}
    assert_no_less_exact(case, found, roundings=3)


def test_a_group() -> None:
    case = make_case(
        300, [896, 128, 128], 896, [64, 64, 64], base="nf4 nested", dtype=torch.bfloat16, dropout_p=0.05
    )
    found = {name: value.cpu() for name, value in run(case_on_gpu(case)).items()}
    assert_no_less_exact(case, found, roundings=6)


def test_the_same_bits_on_every_run() -> None:
    case = case_on_gpu(
        make_case(777, [896], 896, [64], base="nf4 nested", dtype=torch.bfloat16, dropout_p=0.05)
    )
    first = run(case)
    for _ in range(5):
        again = run(case)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dequantisation_is_bit_exact(nested: bool, dtype: torch.dtype) -> None:
    weight = nf4_weight(1000, 896, nested=nested, generator=torch.Generator().manual_seed(0))
    found = nf4_dequantize(on_gpu(weight), dtype).cpu()
    assert torch.equal(found, dequantize(weight, dtype, triton=False))


def test_nothing_is_kept_for_the_backward_but_x_and_xa() -> None:
    rows, n, k, rank = 2048, 3584, 3584, 64
    weight = on_gpu(nf4_weight(n, k, nested=True, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    lora_a = torch.randn(rank, k, device="cuda", requires_grad=True)
    lora_b = torch.randn(n, rank, device="cuda", requires_grad=True)
    y = lora_linear(x, weight, lora_a, lora_b, 2.0, dropout_p=0.05)  # compiled, workspaces of cuBLAS made
    del y
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = lora_linear(x, weight, lora_a, lora_b, 2.0, dropout_p=0.05)
    held = torch.cuda.memory_allocated() - before
    xa_bytes = rows * rank * 2
    # the allocator rounds each block up to 512 bytes
    assert held <= y.numel() * 2 + xa_bytes + 4096
    assert torch.cuda.max_memory_allocated() - before <= y.numel() * 2 + xa_bytes + 2**20


def test_a_second_launch_compiles_nothing() -> None:
    """Ragged row counts, seeds and dropout thresholds share one compiled kernel."""
    from qtrain.kernels.lora_gemm_triton import _forward_kernel

    def compiled() -> int:
        return sum(len(cache[0]) for cache in _forward_kernel.device_caches.values())

    weight = on_gpu(nf4_weight(512, 512, nested=True, generator=torch.Generator().manual_seed(0)))
    lora_a, lora_b = torch.zeros(8, 512, device="cuda"), torch.zeros(512, 8, device="cuda")

    def once(rows: int) -> None:
        x = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16)
        lora_linear(x, weight, lora_a, lora_b, 1.0, dropout_p=0.1)

    once(100)
    before = compiled()
    for rows in (1, 16, 101, 128, 333):
        once(rows)
    assert compiled() == before
