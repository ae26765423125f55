"""The LoRA kernels' semantics under Triton's interpreter, against float64.

The interpreter truncates when it casts to bf16 where a GPU rounds to nearest, so bf16 is allowed twice
the roundings here; the emulator's tests hold it to the plain bound.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qtrain.kernels import lora_linear, nf4_dequantize
from qtrain.kernels.nf4 import dequantize
from tests.kernels.lora_cases import assert_no_less_exact, make_case, nf4_weight, run

ROUNDINGS = {torch.float16: 3, torch.bfloat16: 6}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.sampled_from([1, 2, 31, 64, 65, 129]) | st.integers(1, 150),
    columns=st.sampled_from([64, 128, 192, 320]),
    inner=st.sampled_from([64, 128, 576]),
    rank=st.sampled_from([1, 4, 8, 16, 33, 64, 100, 128]) | st.integers(1, 128),
    base=st.sampled_from(["nf4 nested", "nf4", "16-bit"]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    dropout_p=st.sampled_from([0.0, 0.05, 0.5]),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_no_less_exact_than_plain_products(
    rows: int,
    columns: int,
    inner: int,
    rank: int,
    base: str,
    dtype: torch.dtype,
    dropout_p: float,
    bias: bool,
    seed: int,
) -> None:
    case = make_case(
        rows, [columns], inner, [rank], base=base, dtype=dtype, dropout_p=dropout_p, bias=bias, seed=seed
    )
    assert_no_less_exact(case, run(case), ROUNDINGS[dtype])


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 100),
    ranks=st.lists(st.integers(1, 128), min_size=2, max_size=3),
    base=st.sampled_from(["nf4 nested", "16-bit"]),
    dropout_p=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 1000),
)
def test_a_group_is_its_layers_with_one_mask(
    rows: int, ranks: list[int], base: str, dropout_p: float, seed: int
) -> None:
    columns = [128, 64, 192][: len(ranks)]
    case = make_case(
        rows, columns, 128, ranks, base=base, dtype=torch.float16, dropout_p=dropout_p, seed=seed
    )
    assert_no_less_exact(case, run(case), ROUNDINGS[torch.float16] + len(ranks))


@pytest.mark.parametrize("dequantize_rows", [16, 4096])
def test_a_separate_dequantisation_above_the_break_even(
    monkeypatch: pytest.MonkeyPatch, dequantize_rows: int
) -> None:
    from qtrain.kernels import lora_triton

    monkeypatch.setattr(lora_triton, "DEQUANTIZE_ROWS", dequantize_rows)
    case = make_case(40, [128], 192, [16], base="nf4 nested", dtype=torch.float16)
    assert_no_less_exact(case, run(case), ROUNDINGS[torch.float16])
    assert lora_triton.base_path(40, True)[0] == ("dequantize once" if dequantize_rows < 40 else "fused")


@pytest.mark.parametrize("width", [16, 32, 64, 128, 256])
def test_every_width_of_the_projection(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    from qtrain.kernels import lora_triton

    monkeypatch.setattr(lora_triton, "project_width", lambda *_: width)
    case = make_case(33, [64, 64], 128, [24, 48], base="16-bit", dtype=torch.float16, dropout_p=0.2)
    assert_no_less_exact(case, run(case), ROUNDINGS[torch.float16] + 2)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.sampled_from([1, 3, 33, 257]),
    columns=st.sampled_from([64, 576]),
    nested=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_the_dequantisation_is_bitsandbytes_bit_for_bit(
    rows: int, columns: int, nested: bool, dtype: torch.dtype, seed: int
) -> None:
    weight = nf4_weight(rows, columns, nested=nested, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(nf4_dequantize(weight, dtype), dequantize(weight, dtype, triton=False))


def test_the_same_bits_on_every_run() -> None:
    case = make_case(70, [128], 128, [16], base="nf4", dtype=torch.float16, dropout_p=0.1)
    first, second = run(case), run(case)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(2, 64)}, "bfloat16 and float16"),
        ({"x": torch.zeros(2, 32).half(), "inner": 32}, "multiples of 64"),
    ],
)
def test_what_the_kernels_cannot_take_is_named(change: dict[str, object], words: str) -> None:
    inner = int(str(change.get("inner", 64)))
    x = change["x"]
    assert isinstance(x, torch.Tensor)
    weight = torch.zeros(64, inner, dtype=x.dtype)
    with pytest.raises(ValueError, match=words):
        lora_linear(x, weight, torch.zeros(4, inner), torch.zeros(64, 4), 1.0)
