"""The LoRA and NF4 kernels as compiled for sm_89, executed by the emulator with its race check."""

from __future__ import annotations

import re

import pytest
import torch

from qtrain.bench.examples import Shape
from qtrain.bench.lora_examples import example
from qtrain.bench.ptx import EmulationError, patched
from qtrain.kernels import force_backend, lora_specimens, lora_triton, nf4_triton
from qtrain.kernels.specimens import Specimen
from tests.kernels.lora_cases import assert_no_less_exact, make_case, run
from tests.kernels.poison import poison_empty

SPECIMENS = {specimen.name: specimen for specimen in (*lora_specimens.specimens(), *nf4_triton.specimens())}
# ragged rows, an odd number of tiles in each direction, three steps of the pipelined loops and more
SHAPE = Shape(rows=150, outputs=192, inner=320)


def assert_right(specimen: Specimen, found: torch.Tensor, expected: torch.Tensor) -> None:
    """One rounding to the output's dtype, and the accumulator's: fp32 sums over at most 320 products."""
    if specimen.kernel.__name__ == "_dequantize_kernel":
        assert torch.equal(found.double(), expected)  # the decode is exact, bit for bit
        return
    largest = expected.abs().max()
    bound = torch.finfo(found.dtype).eps / 2 * largest + 320 * torch.finfo(torch.float32).eps * largest
    error = (found.double() - expected).abs().max()
    assert error <= bound, f"error {error:.3g}, bound {bound:.3g}"  # false for a NaN


@pytest.mark.parametrize("name", SPECIMENS)
def test_every_configuration(name: str) -> None:
    launch = example(SPECIMENS[name], SHAPE)
    launch.emulate(racecheck=True)
    for argument, expected in launch.expected.items():
        assert_right(launch.specimen, launch.arguments[argument], expected)


@pytest.mark.parametrize(
    ("base", "dtype", "dropout_p", "tile"),
    [
        ("nf4 nested", torch.bfloat16, 0.1, lora_triton.WIDE),
        ("nf4 nested", torch.bfloat16, 0.0, lora_triton.NARROW),
        ("nf4", torch.float16, 0.1, lora_triton.NARROW),
        ("16-bit", torch.bfloat16, 0.1, lora_triton.WIDE),
    ],
)
def test_the_public_op_forward_and_backward(
    monkeypatch: pytest.MonkeyPatch,
    base: str,
    dtype: torch.dtype,
    dropout_p: float,
    tile: lora_triton.Tile,
) -> None:
    monkeypatch.setattr(lora_triton, "_choose_tile", lambda *_: tile)
    poison_empty(monkeypatch)
    case = make_case(70, [192], 128, [24], base=base, dtype=dtype, dropout_p=dropout_p)
    with force_backend("triton"), patched(racecheck=True):
        found = run(case)
    assert_no_less_exact(case, found, roundings=3)


def test_the_public_op_of_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_empty(monkeypatch)
    case = make_case(40, [128, 64], 128, [16, 64], base="nf4 nested", dtype=torch.bfloat16, dropout_p=0.2)
    with force_backend("triton"), patched(racecheck=True):
        found = run(case)
    assert_no_less_exact(case, found, roundings=5)


@pytest.mark.parametrize(("rows", "rank"), [(1, 1), (17, 100)])
def test_odd_sizes(monkeypatch: pytest.MonkeyPatch, rows: int, rank: int) -> None:
    poison_empty(monkeypatch)
    case = make_case(
        rows, [64], 64, [rank], base="nf4 nested", dtype=torch.bfloat16, dropout_p=0.2, bias=False
    )
    with force_backend("triton"), patched(racecheck=True):
        found = run(case)
    assert_no_less_exact(case, found, roundings=3)


def test_the_same_dropout_mask_in_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """With x, A and B of ones each kernel shows its own mask: xa and dA by sums of it, dx as it is."""
    poison_empty(monkeypatch)
    rows, k = 70, 128
    x, ones = torch.ones(rows, k, dtype=torch.float16), torch.ones(1, k)
    g, none = torch.ones(rows, 1, dtype=torch.float16), torch.zeros(64, k, dtype=torch.float16)
    dy = torch.zeros(rows, 64, dtype=torch.float16)
    with patched():
        xa = lora_triton.down(x, [ones], 0.5, 1234567)
        dx = lora_triton.input_grad([dy], [none], g, [ones], 0.5, 1234567)
        _, d_a = lora_triton.weight_grads([dy], [g], [1.0], g, x, 0.5, 1234567)
    keep = dx.double() / 2
    assert set(keep.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(xa.double().flatten(), 2 * keep.sum(dim=1))  # small integers: exact in fp16
    assert torch.equal(d_a.double().flatten(), 2 * keep.sum(dim=0))


# -- the check can fail ------------------------------------------------------------------------------------

FORWARD = "lora_linear forward nf4 nested bf16 128x128x64 r=64"


def _fails(name: str, edit: object) -> None:
    launch = example(SPECIMENS[name], SHAPE)
    try:
        launch.emulate(racecheck=True, edit=edit)  # type: ignore[arg-type]
    except EmulationError:
        return
    ((argument, expected),) = launch.expected.items()
    with pytest.raises(AssertionError):
        assert_right(launch.specimen, launch.arguments[argument], expected)


def _replaced(pattern: str, replacement: str, count: int = 0):  # type: ignore[no-untyped-def]
    def edit(ptx: str) -> str:
        edited, found = re.subn(pattern, replacement, ptx, count=count)
        assert found, f"nothing in the PTX matches {pattern}"
        return edited

    return edit


def test_a_removed_wait_is_caught() -> None:
    _fails(FORWARD, _replaced(r"cp\.async\.wait_group[^;]*;", ""))


def test_a_missing_barrier_is_caught() -> None:
    _fails(FORWARD, _replaced(r"bar\.sync\s+0;", ""))


def test_a_wrong_decode_is_caught() -> None:
    """The two nibbles of a byte exchanged, and a table that is shifted by one lane."""
    _fails(FORWARD, _replaced(r"(shr\.[ub]32\s+n1, \S+), 12;", r"\1, 8;"))
    _fails(FORWARD, _replaced(r"and\.b32\s+(\S+), lane, 15;", r"and.b32 \1, lane, 7;"))
    _fails("nf4_dequantize bf16 nested", _replaced(r"(mul\.rn\.f32\s+c3, c)3", r"\g<1>2"))


def test_a_mask_that_is_off_by_one_is_caught() -> None:
    """Of the last ragged rows: one row too few is written, or one too many."""
    name = "lora_linear dA bf16 64x64x64 r=64"
    launch = example(SPECIMENS[name], SHAPE)
    wrong = launch.arguments | {"rows": SHAPE.rows - 1}
    type(launch)(launch.specimen, launch.grid, wrong, launch.expected, launch.ideal_bytes).emulate()
    with pytest.raises(AssertionError):
        assert_right(launch.specimen, launch.arguments["out_ptr"], launch.expected["out_ptr"])
    launch = example(SPECIMENS[FORWARD], SHAPE)
    wrong = launch.arguments | {"rows": SHAPE.rows + 1}
    with pytest.raises(EmulationError, match="out-of-bounds"):
        type(launch)(launch.specimen, launch.grid, wrong, launch.expected, launch.ideal_bytes).emulate()


def test_a_missing_rounding_of_the_absmax_is_caught() -> None:
    """The nested absmax is rounded after its product: one fma would give other bits."""

    def fused(ptx: str) -> str:
        found = re.search(
            r"mul\.(?:rn\.)?f32\s+(%\w+), (%\w+), (%\w+);(.*?)add\.(?:rn\.)?f32\s+(%\w+), \1, (%\w+);",
            ptx,
            re.S,
        )
        assert found, "no product and sum of an absmax"
        _product, a, b, between, total, offset = found.groups()
        return ptx.replace(found[0], f"{between}fma.rn.f32 {total}, {a}, {b}, {offset};")

    _fails("nf4_dequantize fp32 nested", fused)
