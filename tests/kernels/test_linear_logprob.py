"""linear_logprob against its float64 definition: values, gradients, extremes, memory, determinism."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtrain.kernels import linear_logprob, logprob_torch, reference


def _case(
    rows: int, hidden: int, vocab: int, seed: int, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(rows, hidden, generator=generator, dtype=torch.float64)
    w = torch.randn(vocab, hidden, generator=generator, dtype=torch.float64) / hidden**0.5 * 3
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < 0.3] = -100
    return h.to(dtype), w.to(dtype), labels


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes of a test span several tiles, the last of them ragged."""
    monkeypatch.setattr(logprob_torch, "ROW_TILE", 8)
    monkeypatch.setattr(logprob_torch, "VOCAB_TILE", 33)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 21),
    hidden=st.sampled_from([1, 7, 16]),
    vocab=st.integers(1, 140),
    softcap=st.sampled_from([None, 4.0]),
    scale=st.sampled_from([1.0, 0.3]),
    with_bias=st.booleans(),
    trainable_head=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_the_definition_with_gradients(
    rows: int,
    hidden: int,
    vocab: int,
    softcap: float | None,
    scale: float,
    with_bias: bool,
    trainable_head: bool,
    seed: int,
) -> None:
    h, w, labels = _case(rows, hidden, vocab, seed)
    bias = torch.randn(vocab, dtype=torch.float64) if with_bias else None
    inputs = [h.requires_grad_()]
    if trainable_head:
        inputs += [w.requires_grad_()] + ([bias.requires_grad_()] if bias is not None else [])
    kwargs = {"bias": bias, "softcap": softcap, "logit_scale": scale}
    ours = linear_logprob(h, w, labels, return_stats=True, **kwargs)
    theirs = reference.linear_logprob(h, w, labels, **kwargs)
    for name, a, b in zip(("logp", "lse", "entropy"), ours, theirs, strict=True):
        # float64 all the way: only the order of additions differs
        torch.testing.assert_close(
            a, b, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )
    weights = torch.randn(rows, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(ours.logp, inputs, weights, allow_unused=True),
        torch.autograd.grad(theirs[0], inputs, weights),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("trainable_head", [False, True])
def test_gradcheck(trainable_head: bool) -> None:
    h, w, labels = _case(9, 5, 50, 3)
    w.requires_grad_(trainable_head)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_logprob(h, w, labels, softcap=6.0), (h.requires_grad_(), w)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_less_exact_than_materialised_logits_of_the_same_dtype(dtype: torch.dtype) -> None:
    h, w, labels = _case(64, 32, 500, 0, dtype)
    labels.clamp_(min=0)

    def run(op, h, w):  # type: ignore[no-untyped-def]
        h = h.detach().requires_grad_()
        value = op(h, w)
        return value.detach().double(), torch.autograd.grad(value.sum(), h)[0].double()

    def naive(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (h @ w.T).float().log_softmax(-1).gather(1, labels[:, None])[:, 0]

    exact = run(lambda h, w: reference.linear_logprob(h, w, labels)[0], h.double(), w.double())
    ours = run(lambda h, w: linear_logprob(h, w, labels), h, w)
    plain = run(naive, h, w)
    # The weighted sum of W is rounded to the low dtype once for each tile of 33 words, here 16 times; in
    # use, tiles are 4096 words wide. The allowance is one rounding of the largest gradient.
    allowance = (1e-6, 2 * torch.finfo(dtype).eps * float(exact[1].abs().max()))
    for name, mine, other, true, slack in zip(("logp", "grad"), ours, plain, exact, allowance, strict=True):
        assert (mine - true).abs().max() <= (other - true).abs().max() + slack, name


def test_rows_without_label_are_zero_and_get_no_gradient() -> None:
    h, w, labels = _case(12, 4, 40, 1)
    labels[:] = -100
    h.requires_grad_()
    value = linear_logprob(h, w, labels)
    value.sum().backward()
    assert torch.equal(value, torch.zeros(12, dtype=torch.float64))
    assert torch.equal(h.grad, torch.zeros_like(h))


def test_no_rows_at_all() -> None:
    h = torch.zeros(0, 4, requires_grad=True)
    value = linear_logprob(h, torch.randn(40, 4), torch.zeros(0, dtype=torch.int64))
    value.sum().backward()
    assert value.shape == (0,)
    assert h.grad is not None
    assert h.grad.shape == (0, 4)


def test_extreme_logits_stay_finite_and_minus_infinity_is_no_nan() -> None:
    h = torch.tensor([[300.0], [-300.0], [1.0]], requires_grad=True)
    w = torch.linspace(-50, 50, 80).unsqueeze(1)
    bias = torch.zeros(80)
    bias[:40] = -torch.inf  # words that are forbidden, whole tiles of them
    labels = torch.tensor([79, 40, 3])
    value = linear_logprob(h, w, labels, bias=bias)
    assert value[0] == 0  # the only word with any probability
    assert torch.isfinite(value[1])
    assert value[2] == -torch.inf  # a forbidden label
    value[:2].sum().backward()
    assert torch.isfinite(h.grad[:2]).all()


def test_log_probs_are_never_positive_in_bf16() -> None:
    h, w, labels = _case(200, 16, 90, 5, torch.bfloat16)
    labels = (h @ (w * 4).T).argmax(dim=1)  # where a rounded logit and an exact one could disagree
    assert (linear_logprob(h, w * 4, labels) <= 0).all()


def test_same_bits_on_every_run() -> None:
    h, w, labels = _case(40, 16, 300, 2, torch.float32)
    runs = []
    for _ in range(3):
        x = h.clone().requires_grad_()
        value = linear_logprob(x, w, labels)
        value.sum().backward()
        runs.append((value.detach(), x.grad))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"labels": torch.tensor([0, 40])}, ValueError, "label 40 is outside"),
        ({"labels": torch.tensor([0, -1])}, ValueError, "label -1 is outside"),
        ({"labels": torch.tensor([0, 1], dtype=torch.int32)}, TypeError, "int64"),
        ({"labels": torch.tensor([0])}, ValueError, "must be"),
        ({"softcap": 0.0}, ValueError, "softcap"),
        ({"bias": torch.zeros(3)}, ValueError, "bias"),
        ({"lm_head_weight": torch.zeros(40, 5)}, ValueError, "lm_head_weight"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, object], error: type[Exception], words: str) -> None:
    arguments = {
        "hidden_states": torch.zeros(2, 4),
        "lm_head_weight": torch.zeros(40, 4),
        "labels": torch.tensor([0, 1]),
    } | change
    with pytest.raises(error, match=words):
        linear_logprob(**arguments)  # type: ignore[arg-type]


def test_memory_does_not_grow_with_rows_times_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """2048 x 65536 float32 logits would be 512 MiB; the tiles are 8 MiB."""
    monkeypatch.undo()
    h = torch.randn(2048, 16, requires_grad=True)
    w, labels = torch.randn(65536, 16), torch.randint(0, 65536, (2048,))
    linear_logprob(h[:8], w, labels[:8]).sum().backward()  # start up thread pools

    def resident() -> int:
        with open("/proc/self/statm") as file:  # noqa: PTH123
            return int(file.read().split()[1]) * 4096

    before, peak, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    linear_logprob(h, w, labels).sum().backward()
    done.set()
    watcher.join()
    assert peak - before < 128 * 2**20
