"""Cards of kernels compiled here for GPUs that are not here, the budget, and the commands."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("triton", reason="kernels are compiled by triton")

import triton

from qtrain.bench import cards
from qtrain.bench.accesses import UNKNOWN
from qtrain.bench.aot import NotCompiled, compile_options, compile_specimen
from qtrain.bench.budget import budgets, violations
from qtrain.bench.cards import Card, make_card, prepare_cards
from qtrain.cli import app
from qtrain.kernels import nf4_triton
from qtrain.kernels import specimens as listing
from qtrain.kernels.specimens import Specimen
from tests.bench.compiled_kernels import copy, copy_kernel, gemm


def test_a_copy_moves_16_bytes_at_a_time() -> None:
    card = make_card(copy(), 89)
    assert card.accesses == {"LDG": {128: 1}, "LDGSTS": {}, "STG": {128: 1}}
    assert card.pointers == {"x_ptr": {"load": {128: 1}}, "y_ptr": {"store": {128: 1}}}
    assert (card.shared_bytes, card.mma, card.main_loop, card.occupancy) == (0, 0, None, 1.0)
    assert violations(card) == []


def test_an_unaligned_stride_shows_as_narrow_accesses() -> None:
    card = make_card(copy(aligned=False), 89)
    assert card.accesses["LDG"] == {16: 8}
    assert violations(card) == [
        "x_ptr: 8 load of 16 bits, wanted are 128",
        "y_ptr: 8 store of 16 bits, wanted are 128",
    ]


@pytest.mark.parametrize("arch", [80, 86, 89, 120])
def test_a_product_of_warps(arch: int) -> None:
    """128 x 128 x 64 in eight warps: each has 64 products of 16 x 8 x 16. Two of three stages are stored."""
    card = make_card(gemm(), arch)
    assert (card.mma, card.warp_group_mma) == (64, 0)
    assert card.main_loop is not None
    assert card.main_loop["HMMA"] == 64
    # each warp reads fragments of 32 x 64 and of 64 x 64 (or the other way round), 16 x 16 at a time
    assert card.main_loop["LDSM"] == 24
    assert card.other_per_mma == pytest.approx(sum(card.main_loop.values()) / 64 - 1)
    assert card.shared_bytes == 2 * (128 + 128) * 64 * 2
    assert (card.spill_stores, card.spill_loads, card.stack_bytes) == (0, 0, 0)
    assert card.pointers == {
        "x_ptr": {"copy": {128: 12}},
        "w_ptr": {"copy": {128: 12}},
        "y_ptr": {"store": {128: 8}},
    }
    assert violations(card) == []


def test_a_product_of_warp_groups() -> None:
    card = make_card(gemm(), 90)
    assert (card.mma, card.warp_group_mma) == (0, 4)
    assert card.main_loop is not None
    assert card.main_loop["HGMMA"] == 4
    assert violations(card) == []  # the instruction mix of the others is no measure here


def test_spilling_is_seen() -> None:
    card = make_card(gemm(maxnreg=96), 89)
    assert card.registers == 96
    assert card.stack_bytes > 0
    assert card.spill_stores > 0
    assert card.spill_loads > 0
    assert violations(card)[0].startswith(f"spills: {card.stack_bytes} bytes of stack")


def test_a_card_is_made_once() -> None:
    assert make_card(gemm(), 89) is make_card(gemm(), 89)
    assert make_card(gemm(), 89) is not make_card(gemm(budget="light"), 89)


def test_cards_made_together_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [make_card(one, 89) for one in (gemm(), copy())]
    monkeypatch.setattr(cards, "_CARDS", {})
    prepare_cards([gemm(), copy(columns=24), copy()], 89, threads=2)
    assert [card.specimen for card in cards._CARDS.values()] == [card.specimen for card in wanted]
    assert [make_card(one, 89) for one in (gemm(), copy())] == wanted
    with pytest.raises(NotCompiled):
        make_card(copy(columns=24), 89)


def test_whether_fma_is_allowed_is_always_said() -> None:
    assert compile_options(copy())["enable_fp_fusion"] is False
    assert compile_options(replace(copy(), options={}))["enable_fp_fusion"] is True


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"signature": {"x_ptr": "*bf16"}}, r"missing \['rows', 'stride', 'y_ptr'\], unknown \[\]"),
        ({"constexprs": {"COLUMNS": 8, "ROWS": 1}}, r"missing \[\], unknown \['ROWS'\]"),
        ({"constexprs": {}, "signature": dict.fromkeys(copy_kernel.arg_names, "constexpr")}, "constexpr"),
        ({"aligned": frozenset({"COLUMNS"})}, r"aligned: \['COLUMNS'\]"),
        ({"hot": ("stride",)}, r"hot: \['stride'\] is not among \['x_ptr', 'y_ptr'\]"),
        ({"options": {"fast_math": True}}, r"options: \['fast_math'\]"),
        ({"kernel": copy_kernel.fn}, "kernel is a function, needs a JITFunction"),
    ],
)
def test_specimens_that_do_not_fit_their_kernel(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compile_specimen(replace(copy(), **changes), 89)


def test_an_argument_that_a_launch_does_not_specialise_cannot_be_aligned() -> None:
    kernel = triton.JITFunction(copy_kernel.fn, do_not_specialize=["stride"])
    with pytest.raises(ValueError, match=r"aligned: \['stride'\]"):
        compile_specimen(replace(copy(), kernel=kernel), 89)


def test_what_the_compiler_refuses_is_named() -> None:
    with pytest.raises(NotCompiled, match="copy 24 aligned: sm_89: "):
        compile_specimen(copy(columns=24), 89)  # no power of two


@pytest.fixture
def card() -> Card:
    return replace(make_card(gemm(), 89), budget="bf16_gemm")


def test_spills_without_a_stack_count(card: Card) -> None:
    assert violations(replace(card, spill_loads=1)) == [
        "spills: 0 bytes of stack, 0 STL, 1 LDL; allowed are 0 bytes"
    ]


@pytest.mark.parametrize(("arch", "limit"), [(80, 163), (86, 99), (89, 99), (90, 227), (120, 99)])
def test_shared_memory_is_limited_by_architecture(card: Card, arch: int, limit: int) -> None:
    fits = replace(card, arch=arch, shared_bytes=limit * 1024)
    assert violations(fits) == []
    assert violations(replace(fits, shared_bytes=limit * 1024 + 1)) == [
        f"shared memory: {limit * 1024 + 1} bytes, allowed are {limit * 1024}"
    ]


def test_the_main_loop_is_limited_by_kernel(card: Card) -> None:
    assert violations(replace(card, other_per_mma=1.8)) == []
    assert violations(replace(card, other_per_mma=1.81)) == [
        "main loop: 1.81 other instructions per HMMA, allowed are 1.8"
    ]
    assert violations(replace(card, other_per_mma=3.5, budget="nf4_gemm")) == []
    assert violations(replace(card, other_per_mma=9.0, budget="light")) == []
    assert violations(replace(card, main_loop=None, other_per_mma=None)) == [
        "main loop: no loop with tensor core instructions was found"
    ]


def test_a_hot_pointer_without_accesses_or_with_unknown_ones(card: Card) -> None:
    without = {name: kinds for name, kinds in card.pointers.items() if name != "x_ptr"}
    assert violations(replace(card, pointers=without)) == ["x_ptr: no global access goes through it"]
    unknown = card.pointers | {UNKNOWN: {"load": {128: 1}}}
    assert "could not be found out" in violations(replace(card, pointers=unknown))[0]


def test_an_unknown_budget_is_an_error(card: Card) -> None:
    with pytest.raises(ValueError, match=r"budget 'gem', there is .*bf16_gemm"):
        violations(replace(card, budget="gem"))


def test_every_rule_of_the_file_is_known() -> None:
    """A misspelt key would never be applied."""
    rules = budgets()
    assert rules.keys() == {"all", "shared_bytes", "budget"}
    assert rules["all"].keys() == {"spill_bytes", "hot_access_bits"}
    assert {key for entry in rules["budget"].values() for key in entry} == {"other_per_mma"}


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[Specimen]:
    specimens = [copy(), copy(aligned=False)]
    monkeypatch.setattr(listing, "all_specimens", lambda: specimens)
    return specimens


@pytest.mark.usefixtures("listed")
def test_the_command_writes_what_it_shows(tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "cards.json"), "--markdown", str(tmp_path / "cards.md")]
    done = CliRunner().invoke(app, ["bench", "cards", "--arch", "89", "--only", "copy 1024 aligned", *files])
    assert done.exit_code == 0, done.output
    assert "copy 1024 aligned" in done.stdout
    assert "unaligned" not in done.stdout
    report = json.loads((tmp_path / "cards.json").read_text())
    assert report["timed"] is False
    assert report["provenance"]["versions"]["triton"] == triton.__version__
    [card] = report["cards"]
    assert (card["specimen"], card["arch"], card["accesses"]["LDG"]) == ("copy 1024 aligned", 89, {"128": 1})
    assert card["over_budget"] == []
    assert "| copy 1024 aligned | 89 |" in (tmp_path / "cards.md").read_text()


@pytest.mark.usefixtures("listed")
def test_over_budget_is_exit_code_1() -> None:
    done = CliRunner().invoke(app, ["bench", "cards", "--arch", "89"])
    assert done.exit_code == 1
    assert "copy 1024 unaligned, sm_89: x_ptr: 8 load of 16 bits, wanted are 128" in done.stdout


def test_emulated_figures_are_of_sm_89(listed: list[Specimen], tmp_path: Path) -> None:
    listed[:] = [copy(), nf4_triton.specimens()[0]]
    archs = ["--arch", "80", "--arch", "89"]
    done = CliRunner().invoke(
        app, ["bench", "cards", *archs, "--emulate", "--json", str(tmp_path / "cards.json")]
    )
    assert done.exit_code == 0, done.output
    assert "Executed by the emulator" in done.stdout
    report = json.loads((tmp_path / "cards.json").read_text())
    [seen] = [card["emulated"] for card in report["cards"] if card["emulated"]]
    assert seen["bound"] == "DRAM"
    assert seen["touched"] == pytest.approx(1, abs=0.001)  # 1024 x 1024 weights in whole sectors


def test_a_kernel_that_does_not_compile_is_exit_code_1(listed: list[Specimen]) -> None:
    listed[:] = [copy(columns=24), copy()]
    done = CliRunner().invoke(app, ["bench", "cards", "--arch", "89"])
    assert done.exit_code == 1
    assert "copy 24 aligned: sm_89" in done.output
    assert "copy 1024 aligned" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "75"], "--arch 75: there is 80, 86, 89, 90, 120"),
        (["--only", "gemm"], "--only 'gemm' fits none"),
        (["--arch", "80", "--emulate"], "--emulate runs the code for sm_89: add --arch 89"),
    ],
)
@pytest.mark.usefixtures("listed")
def test_wrong_arguments_are_exit_code_2(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["bench", "cards", *arguments])
    assert done.exit_code == 2
    assert message in done.output


@pytest.mark.parametrize("command", [["-m", "qtrain.bench.cards"], ["-m", "qtrain", "bench", "cards"]])
def test_without_triton_one_line_says_what_to_install(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "triton.py").write_text("raise ImportError('no triton here')\n")
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True, text=True, check=False, env={"PYTHONPATH": str(tmp_path), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.strip() == 'triton is not installed: pip install "triton>=3.6,<3.10"'


def test_the_bench_package_lists_its_commands() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qtrain.bench", "--help"], capture_output=True, text=True, check=True
    )
    assert "cards" in done.stdout
    assert "train" in done.stdout
