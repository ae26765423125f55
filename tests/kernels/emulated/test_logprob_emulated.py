"""The log-prob kernels as compiled for sm_89, executed by the emulator with its race check."""

from __future__ import annotations

import pytest
import torch

from qtrain.bench.examples import Shape
from qtrain.bench.logprob_examples import example
from qtrain.kernels import logprob_specimens
from qtrain.kernels.specimens import Specimen
from tests.kernels.emulated.emulation import (
    Edit,
    Fault,
    assert_noticed,
    emulated,
    missing_barrier,
    missing_wait,
    no_rescaling,
    off_by_one,
)
from tests.kernels.logprob_cases import assert_no_less_exact, make_case, ours
from tests.kernels.poison import poison_empty

SPECIMENS = {specimen.name: specimen for specimen in logprob_specimens.specimens()}
# two row tiles and three tiles of words, all ragged; four steps of the pipelined loops, the last one half
SHAPE = Shape(rows=131, outputs=519, inner=224)


def check_example(specimen: Specimen, edit: Edit | None = None) -> None:
    launch = example(specimen, SHAPE)
    launch.emulate(racecheck=True, edit=edit)
    for argument, expected in launch.expected.items():
        found = launch.arguments[argument]
        wanted = ~expected.isnan()
        largest = expected[wanted].abs().max()
        # one rounding to the output's dtype; 519 products in fp32, and exponentials of arguments up to 100
        bound = torch.finfo(found.dtype).eps / 2 * largest + 512 * torch.finfo(torch.float32).eps * largest
        error = (found.double() - expected)[wanted].abs().max()
        assert error <= bound, f"{argument}: error {error:.3g}, bound {bound:.3g}"  # false for a NaN


@pytest.mark.parametrize("name", SPECIMENS)
def test_every_configuration(name: str) -> None:
    check_example(SPECIMENS[name])


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tiles of words a chunk, shared by two splits; 128 rows at a time where the head learns."""
    from qtrain.kernels import logprob_triton

    monkeypatch.setattr(logprob_triton, "CHUNK_ELEMENTS", 2 * 128 * 256)
    monkeypatch.setattr(logprob_triton, "PROGRAMS", 2)
    monkeypatch.setattr(logprob_triton, "HEAD_ROWS_AT_ONCE", 128)
    poison_empty(monkeypatch)


def check_frozen(edit: Edit | None = None) -> None:
    case = make_case(24, 80, 900, torch.bfloat16, bias=True, forbidden=0.2, softcap=15.0)
    with emulated(edit) as log:
        found = ours(case)
    forward = ["_statistics_kernel", "_units_kernel", "_accumulate_kernel"] * 2 + ["_finish_kernel"]
    assert [name for name, _ in log] == forward
    # u, its product with the gradient, P, and W as the plain op has them too
    assert_no_less_exact(case, found, roundings=3)


def check_trainable(edit: Edit | None = None) -> None:
    case = make_case(170, 48, 300, torch.float16, bias=True, scale=0.5, ignored=0.1, trainable_head=True)
    with emulated(edit) as log:
        found = ours(case)
    assert [name for name, _ in log][-4:] == ["_logit_gradient_kernel", "_head_gradient_kernel"] * 2
    assert_no_less_exact(case, found, roundings=3)


@pytest.mark.usefixtures("small_chunks")
def test_the_public_op_with_a_frozen_head() -> None:
    check_frozen()


@pytest.mark.usefixtures("small_chunks")
def test_the_public_op_with_a_head_that_learns() -> None:
    check_trainable()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    "fault",
    [
        no_rescaling(kernel="_units_kernel", at="exp(unit - following)"),
        no_rescaling(kernel="_units_kernel", at="exp(running - grown)"),
        no_rescaling(kernel="_finish_kernel", at="weight = tl.exp"),
        Fault(r"mul\.f32\s+(\S+), (\S+), \S+;", r"mov.b32 \1, \2;", kernel="_accumulate_kernel", at="acc *="),
        off_by_one(kernel="_statistics_kernel", at="counted ="),
        missing_wait(kernel="_accumulate_kernel"),
        missing_barrier(kernel="_statistics_kernel"),
    ],
    ids=lambda fault: f"{fault.kernel} {fault.at} {fault.pattern}"[:60],
)
def test_faults_are_noticed(fault: Fault) -> None:
    assert_noticed(check_frozen, fault)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    "fault",
    [
        missing_wait(kernel="_head_gradient_kernel"),
        off_by_one(kernel="_head_gradient_kernel", at="wanted ="),
        Fault(r"setp\.lt\.u32", "setp.gt.u32", kernel="_logit_gradient_kernel", at="own ="),
    ],
    ids=lambda fault: f"{fault.kernel} {fault.at} {fault.pattern}"[:60],
)
def test_faults_of_the_heads_gradient_are_noticed(fault: Fault) -> None:
    assert_noticed(check_trainable, fault)
