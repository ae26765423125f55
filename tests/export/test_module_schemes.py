"""Which module is quantised how, and what readers make of it."""

from __future__ import annotations

import pytest

from qtrain.export.errors import ExportError
from qtrain.export.formats.scheme import Scheme
from qtrain.export.module_schemes import choose_schemes, parse_change, reader_warnings

NAMES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")
MODULES = [f"model.layers.{layer}.{name}" for layer in (0, 1, 10) for name in NAMES]
FOUR = Scheme(4, 64)


def chosen(*changes: str) -> dict[str, Scheme | None]:
    return choose_schemes(MODULES, FOUR, [parse_change(text) for text in changes])


def test_parts_of_names_are_whole_words() -> None:
    found = chosen("modules.layers.1.bits=8")
    eight = [module for module, scheme in found.items() if scheme == Scheme(8, 64)]
    assert eight == [f"model.layers.1.{name}" for name in NAMES]  # and none of layer 10
    found = chosen("modules.mlp.group_size=-1", "modules.model.layers.0.mlp.down_proj.sym=false")
    assert found["model.layers.10.mlp.down_proj"] == Scheme(4, -1)
    assert found["model.layers.0.mlp.down_proj"] == Scheme(4, -1, symmetric=False)
    assert found["model.layers.0.self_attn.q_proj"] == FOUR


def test_later_changes_win() -> None:
    found = chosen("modules.down_proj.bits=16", "modules.layers.1.mlp.bits=8")
    assert found["model.layers.0.mlp.down_proj"] is None
    assert found["model.layers.1.mlp.down_proj"] == Scheme(8, 64)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("down_proj.bits=8", "must be like modules.down_proj.bits=8"),
        ("modules.down_proj=8", "must be like modules.down_proj.bits=8"),
        ("modules.down_proj.bits", "must be like modules.down_proj.bits=8"),
        ("modules.down_proj.groupsize=64", "did you mean modules.down_proj.group_size?"),
        ("modules.down_proj.group_size=48", "'48' must be one of 32, 64, 128, -1"),
        ("modules.down_proj.symmetric=maybe", "'maybe' must be true or false"),
        ("modules.down_porj.bits=8", "did you mean modules.down_proj.bits?"),
        ("modules.proj.bits=8", "no module is called 'proj'"),
        ("modules.layers.2.bits=8", "no module is called 'layers.2'"),
    ],
)
def test_mistakes(text: str, message: str) -> None:
    with pytest.raises(ExportError, match="--set") as caught:
        chosen(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parts_that_vllm_runs_as_one_must_be_alike() -> None:
    alike = chosen("modules.self_attn.bits=8")
    assert reader_warnings("compressed-tensors", alike, tied=True) == []
    warnings = reader_warnings("compressed-tensors", chosen("modules.k_proj.bits=8"), tied=True)
    assert warnings == [
        "vLLM runs model.layers.0.self_attn's q_proj, k_proj, v_proj as one layer, "
        "and refuses parts that differ"
    ]


def test_what_readers_refuse() -> None:
    every = dict.fromkeys(MODULES, Scheme(4, 64, symmetric=False, desc_act=True))
    warnings = " ".join(reader_warnings("gptq", every, tied=True))
    assert "full activation order" in warnings
    assert "asymmetric GPTQ" in warnings
    assert reader_warnings("gptq", dict.fromkeys(MODULES, FOUR), tied=True) == []
    assert reader_warnings("awq", dict.fromkeys(MODULES, Scheme(4, 64, symmetric=False)), tied=True) == []
