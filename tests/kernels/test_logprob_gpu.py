"""linear_logprob on a CUDA device: correctness of the real launch, determinism, memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qtrain.kernels import force_backend, linear_logprob
from qtrain.kernels.logprob import choose_backend
from tests.kernels.logprob_cases import Case, assert_no_less_exact, make_case, ours

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_gpu(case: Case) -> Case:
    tensors = {name: value.cuda() for name, value in vars(case).items() if isinstance(value, torch.Tensor)}
    return replace(case, **tensors)


@pytest.mark.parametrize("trainable_head", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "hidden", "vocab"), [(1, 64, 1000), (700, 896, 5003), (300, 512, 32064), (4500, 256, 3000)]
)
def test_no_less_exact_than_the_plain_op(
    rows: int, hidden: int, vocab: int, dtype: torch.dtype, trainable_head: bool
) -> None:
    case = on_gpu(
        make_case(rows, hidden, vocab, dtype, bias=True, softcap=30.0, trainable_head=trainable_head)
    )
    assert choose_backend(case.weight)[0] == "triton"
    assert_no_less_exact(case, ours(case), roundings=3)


def test_float32_weights_take_the_pytorch_path() -> None:
    case = on_gpu(make_case(100, 64, 500, torch.float32))
    backend, reason = choose_backend(case.weight)
    assert (backend, "float32" in reason) == ("pytorch", True)
    assert_no_less_exact(case, ours(case), roundings=3)


def test_both_paths_agree() -> None:
    case = on_gpu(make_case(500, 256, 4000, torch.bfloat16, trainable_head=True))
    triton = ours(case)
    with force_backend("pytorch"):
        pytorch = ours(case)
    for name, value in triton.items():
        # each is within a few roundings to bf16 of the truth
        slack = 6 * torch.finfo(torch.bfloat16).eps * pytorch[name].abs().max()
        assert (value - pytorch[name]).abs().max() <= slack, name


def test_same_bits_on_every_run() -> None:
    case = on_gpu(make_case(1000, 512, 32000, torch.bfloat16, trainable_head=True))
    first = ours(case)
    for _ in range(5):
        assert all(torch.equal(value, first[name]) for name, value in ours(case).items())


def test_memory_is_that_of_the_docstring() -> None:
    rows, hidden, vocab = 8192, 1024, 152064
    h = torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab, hidden, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(vocab, (rows,), device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_logprob(h, weight, labels).sum().backward()
    u = rows * hidden * 2
    tile = 2**26 + 4096 * (6 * hidden + vocab / 21)
    # u, dh and its float32 product with the gradient, and a few values a row
    assert torch.cuda.max_memory_allocated() - before <= tile + 4 * u + 2**22
