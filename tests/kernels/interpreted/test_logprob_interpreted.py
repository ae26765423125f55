"""The log-prob kernels' semantics under Triton's interpreter, against float64.

The interpreter truncates when it casts to bf16 where a GPU rounds to nearest, so bf16 is allowed twice
the roundings here; the emulator's tests hold it to the plain bound.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qtrain.kernels import linear_logprob, logprob_triton
from qtrain.kernels.logprob_triton import Gemm
from tests.kernels.logprob_cases import assert_no_less_exact, make_case, ours

ROUNDINGS = {torch.float16: 3, torch.bfloat16: 6}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 rows and 32 words, chunks of three tiles of words, 64 rows at a time."""
    monkeypatch.setattr(logprob_triton, "LOGITS", Gemm(16, 32, 16, 4, 2))
    monkeypatch.setattr(logprob_triton, "WIDE", Gemm(16, 32, 16, 4, 2))
    monkeypatch.setattr(logprob_triton, "NARROW", Gemm(16, 16, 32, 4, 2))
    monkeypatch.setattr(logprob_triton, "HEAD", Gemm(16, 32, 16, 4, 2))
    monkeypatch.setattr(logprob_triton, "UNITS_ROWS", 16)
    monkeypatch.setattr(logprob_triton, "ROWS_AT_ONCE", 64)
    monkeypatch.setattr(logprob_triton, "HEAD_ROWS_AT_ONCE", 32)
    monkeypatch.setattr(logprob_triton, "CHUNK_ELEMENTS", 64 * 32 * 3)
    monkeypatch.setattr(logprob_triton, "PROGRAMS", 8)


SMALL = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.mark.usefixtures("small_tiles")
@SMALL
@given(
    rows=st.sampled_from([1, 15, 16, 17, 70]) | st.integers(1, 80),
    hidden=st.sampled_from([16, 32, 48, 96]),
    vocab=st.sampled_from([1, 2, 31, 32, 33, 96, 97]) | st.integers(1, 300),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    hidden_dtype=st.sampled_from([None, torch.float32]),
    bias=st.booleans(),
    softcap=st.sampled_from([None, 5.0]),
    scale=st.sampled_from([1.0, 0.3]),
    spread=st.sampled_from([0.1, 3.0, 30.0]),
    trainable_head=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_no_less_exact_than_the_plain_op(
    rows: int,
    hidden: int,
    vocab: int,
    dtype: torch.dtype,
    hidden_dtype: torch.dtype | None,
    bias: bool,
    softcap: float | None,
    scale: float,
    spread: float,
    trainable_head: bool,
    seed: int,
) -> None:
    case = make_case(
        rows,
        hidden,
        vocab,
        dtype,
        hidden_dtype=hidden_dtype,
        bias=bias,
        forbidden=0.3,
        softcap=softcap,
        scale=scale,
        spread=spread,
        trainable_head=trainable_head,
        seed=seed,
    )
    assert_no_less_exact(case, ours(case), ROUNDINGS[dtype])


@pytest.mark.parametrize(("hidden", "vocab"), [(256, 2376), (48, 300)])  # 2376 = 152064 / 64
def test_the_tiles_of_a_launch(hidden: int, vocab: int) -> None:
    case = make_case(140, hidden, vocab, torch.float16, ignored=0.05, trainable_head=vocab < 1000)
    assert_no_less_exact(case, ours(case), ROUNDINGS[torch.float16])


@pytest.mark.usefixtures("small_tiles")
def test_a_vocabulary_of_thousands_in_many_chunks() -> None:
    case = make_case(33, 32, 2376, torch.bfloat16, spread=6.0)
    assert_no_less_exact(case, ours(case), ROUNDINGS[torch.bfloat16])


@pytest.mark.usefixtures("small_tiles")
def test_extreme_logits_and_whole_tiles_of_forbidden_words() -> None:
    h = torch.tensor([[300.0], [-300.0], [1.0]]).repeat(1, 16).half().requires_grad_()
    w = (torch.linspace(-50, 50, 160)[:, None] / 16).repeat(1, 16).half()
    bias = torch.zeros(160)
    bias[:70] = -torch.inf
    labels = torch.tensor([159, 70, 3])
    value = linear_logprob(h, w, labels, bias=bias)
    assert value[0] == 0  # the only word with any probability
    assert torch.isfinite(value[1])
    assert value[2] == -torch.inf  # a forbidden label
    value[:2].sum().backward()
    assert torch.isfinite(h.grad[:2]).all()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("order", [1, -1])
def test_maxima_far_apart_from_tile_to_tile(order: int) -> None:
    """By hundreds, upwards or downwards: where unscaled sums would overflow or vanish."""
    steps = torch.arange(12).flip(0) if order < 0 else torch.arange(12)
    bias = (steps * 90.0).repeat_interleave(30)
    case = make_case(20, 32, 360, torch.float16, bias=True, ignored=0.0)
    case.bias.copy_(bias)
    assert_no_less_exact(case, ours(case), ROUNDINGS[torch.float16])


@pytest.mark.usefixtures("small_tiles")
def test_log_probs_are_never_positive_and_exact_where_the_label_is_certain() -> None:
    case = make_case(60, 32, 200, torch.bfloat16, spread=30.0, ignored=0.0)
    case.labels.copy_((case.h.float() @ case.weight.float().T).argmax(1))
    found = ours(case)
    assert (found["logp"] <= 0).all()
    assert_no_less_exact(case, found, ROUNDINGS[torch.bfloat16])


@pytest.mark.parametrize("rows", [0, 5])
def test_no_labelled_row(rows: int) -> None:
    h = torch.randn(rows, 16).half().requires_grad_()
    w = torch.randn(40, 16).half().requires_grad_()
    value = linear_logprob(h, w, torch.full((rows,), -100))
    value.sum().backward()
    assert torch.equal(value, torch.zeros(rows))
    assert torch.equal(h.grad, torch.zeros(rows, 16, dtype=torch.float16))
    assert torch.equal(w.grad, torch.zeros(40, 16, dtype=torch.float16))


@pytest.mark.usefixtures("small_tiles")
def test_the_forward_alone_gives_the_same() -> None:
    case = make_case(50, 32, 200, torch.float16, bias=True)
    with torch.no_grad():
        alone = linear_logprob(case.h, case.weight, case.labels, bias=case.bias)
    assert torch.equal(alone.double(), ours(case)["logp"])


@pytest.mark.usefixtures("small_tiles")
def test_a_dropped_rescaling_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(20, 32, 300, torch.float16, spread=6.0)
    monkeypatch.setattr(logprob_triton._Softmax, "add", _without_rescaling(logprob_triton._Softmax.add))
    with pytest.raises(AssertionError, match="dh"):
        assert_no_less_exact(case, ours(case), ROUNDINGS[torch.float16])


def _without_rescaling(add):  # type: ignore[no-untyped-def]
    def changed(self, top, first, size):  # type: ignore[no-untyped-def]
        add(self, torch.zeros_like(top), first, size)

    return changed
