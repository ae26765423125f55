"""`qtrain bench kernels` at tiny shapes, its gate, and what happens to variants that fail."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from qtrain.bench import kernel_run, kernel_shapes, kernel_variants
from qtrain.bench.kernel_data import Data, make_data
from qtrain.bench.kernel_gate import check, check_dropout, expected
from qtrain.bench.kernel_report import cells, columns, notes
from qtrain.bench.kernel_roofline import rates_of, roofline_seconds
from qtrain.bench.kernel_shapes import MODELS, OPS, Case, Model, cases
from qtrain.bench.kernel_timing import OUT_OF_MEMORY, Plan, Timed, attempt, sample
from qtrain.bench.kernel_variants import AGAIN, COMPILED, EAGER, OURS, PEFT_4BIT, Operation, eager, ours
from qtrain.bench.provenance import gpu_clocks
from qtrain.cli import app

TINY = Model("tiny", hidden=64, kv=64, intermediate=128, vocabulary=300)
LORA = Case("lora_linear", "tiny", "down", "nf4", "bf16", 24, (64,), 128, rank=8, dropout_p=0.25)
HEAD = Case("linear_logprob", "tiny", "head", "16-bit", "fp32", 24, (300,), 64)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _a_tiny_model(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "tiny", TINY)
    monkeypatch.setattr(kernel_shapes, "QUICK_PARTS", ("down", "q/k/v", "head"))


def bench(tmp_path: Path, *arguments: str) -> tuple[Any, list[dict[str, Any]]]:
    """(result, rows) of a run with five samples each."""
    out = tmp_path / "kernels.json"
    command = ["bench", "kernels", "--quick", "--model", "tiny", "--rows", "24", "--samples", "5"]
    command += ["--out", str(out)]
    result = CliRunner().invoke(app, [*command, *arguments])
    return result, json.loads(out.read_text())["rows"] if out.is_file() else []


@pytest.mark.parametrize("op", OPS)
def test_every_op_is_timed_beside_what_is_installed(op: str, tmp_path: Path) -> None:
    words = [word for name in ("eager", "peft", "bitsandbytes", "TRL") for word in ("--variant", name)]
    result, rows = bench(tmp_path, "--op", op, *words, "--markdown", str(tmp_path / "table.md"))
    assert result.exit_code == 0, result.output
    assert {row["op"] for row in rows} == {op}
    assert {row["pass"] for row in rows} == set(replace(LORA, op=op).passes)
    for row in rows:
        if row["status"] != "ok":
            assert row["variant"] == "TRL"
            assert row["status"] == "not installed: pip install trl==1.16.0"
            assert "p50_s" not in row
            continue
        assert len(row["samples_s"]) == row["n"] == 5
        assert 0 < row["p05_s"] <= row["p50_s"] <= row["p95_s"]
        assert row["flops"] > 0
        assert row["ideal_bytes"] > 0
        assert all(0 <= error < 0.05 for error in row["errors"].values())
        assert row["noise_floor"] is not None
        expected_verdicts = {OURS: {"baseline"}, AGAIN: {"noise"}}
        others = {"faster", "slower", "no difference"}
        assert row["verdict"] in expected_verdicts.get(row["variant"], others)
    report = json.loads((tmp_path / "kernels.json").read_text())
    assert report["provenance"]["command"]
    assert report["protocol"]["clock"] == "CPU time of all threads"
    table = (tmp_path / "table.md").read_text()
    assert table.count("### ") == len({(row["part"], row["base"], row["pass"]) for row in rows})


def test_torch_compile_is_a_variant(tmp_path: Path) -> None:
    result, rows = bench(tmp_path, "--op", "nf4_dequantize", "--variant", COMPILED)
    assert result.exit_code == 0, result.output
    assert {row["status"] for row in rows if row["variant"] == COMPILED} == {"ok"}


def test_a_wrong_op_gets_no_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unscaled(case: Case, data: Any, dropout_p: float) -> Operation:
        return ours(case, replace(data, scaling=1.0), dropout_p)

    monkeypatch.setattr(kernel_variants, "ours", unscaled)
    result, rows = bench(tmp_path, "--op", "lora_linear", "--variant", "eager")
    assert result.exit_code == 1
    for row in rows:
        if row["variant"] == EAGER:
            assert row["status"] == "ok"
            assert row["p50_s"] > 0
            assert "ratio" not in row  # of a wrong baseline there is none
        else:
            assert row["status"].startswith("wrong: y0 is off by")
            assert not {"p50_s", "samples_s", "ratio"} & row.keys()
    assert "wrong: y0 is off by" in result.output


def test_a_variant_without_memory_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hungry(case: Case, data: Data, dropout_p: float) -> Operation:
        operation = eager(case, data, dropout_p)

        def forward() -> tuple[Tensor, ...]:
            raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")

        return replace(operation, forward=forward)

    monkeypatch.setattr(kernel_variants, "eager", hungry)
    result, rows = bench(tmp_path, "--op", "linear_logprob", "--variant", "eager")
    assert result.exit_code == 0, result.output
    assert {row["variant"]: row["status"] for row in rows} == {OURS: "ok", AGAIN: "ok", EAGER: OUT_OF_MEMORY}


def test_what_a_cpu_can_not_hold_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_run, "available_bytes", lambda: 1000)
    _, rows = bench(tmp_path, "--op", "linear_logprob", "--variant", "eager")
    assert {row["status"] for row in rows if row["variant"] == EAGER} == {"out of memory: needs about 0 GiB"}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--op", "matmul"], "--op matmul: there is lora_linear, lora_linear_group"),
        (["--model", "70B"], "--model 70B: there is 0.5B, 1.5B, 7B"),
        (["--dtype", "int8"], "--dtype int8: there is bf16, fp16, fp32"),
        (["--out", "/no/such/folder/x.json"], "--out /no/such/folder/x.json: there is no folder /no/such"),
        (["--variant", "megatron"], "--variant megatron: there is qtrain, qtrain (again)"),
    ],
)
def test_an_unknown_name_is_one_line(arguments: list[str], line: str) -> None:
    result = CliRunner().invoke(app, ["bench", "kernels", *arguments])
    assert result.exit_code == 2
    assert result.output.startswith(line)
    assert len(result.output.splitlines()) == 1


def results(case: Case, dropout_p: float = 0.0) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(expected, what ours gives) at a seed."""
    data = make_data(case, CPU, 0)
    found = kernel_run._results(ours(case, data, dropout_p))
    return expected(case, data), {name: tensor.clone() for name, tensor in found.items()}


@pytest.mark.parametrize("name", ["y0", "dx", "dA0", "dB0"])
def test_the_gate_sees_one_wrong_element(name: str) -> None:
    """Off by the tensor's own root mean square, that is by what a value is on average."""
    target, found = results(LORA)
    assert check(LORA, target, found) is None
    found[name][3, 5] += found[name].square().mean().sqrt()
    assert str(check(LORA, target, found)).startswith(f"wrong: {name} is off by")


def test_the_gate_sees_nan_and_infinity() -> None:
    target, found = results(LORA)
    assert str(check(LORA, target, found | {"y0": found["y0"] * torch.nan})).startswith("wrong: y0 is off")
    found["dx"][0, 0] = torch.inf
    assert str(check(LORA, target, found)).startswith("wrong: dx")


def test_the_gate_sees_a_shifted_label_and_an_ungraded_row() -> None:
    target, found = results(HEAD)
    assert check(HEAD, target, found) is None
    assert str(check(HEAD, target, {"logp": found["logp"].roll(1)})).startswith("wrong: logp is off by")
    found["dh"][7] = 0
    assert str(check(HEAD, target, found)).startswith("wrong: dh is off by")


def test_the_gate_allows_a_dequantised_weight_one_unit_in_the_last_place() -> None:
    case = Case("nf4_dequantize", "tiny", "down", "nf4", "bf16", 0, (64,), 128)
    target, found = results(case)
    bits = found["w"].view(torch.int16)
    assert check(case, target, found) is None
    bits[5, 5] += 1
    assert check(case, target, found) is None
    bits[5, 5] += 1
    assert str(check(case, target, found)).startswith("wrong: w is off by")


def test_dropout_is_held_to_its_law() -> None:
    target, found = results(LORA, LORA.dropout_p)
    assert check_dropout(LORA, target, found) is None
    _, without = results(LORA, 0.0)
    assert str(check_dropout(LORA, target, without)).startswith("wrong: dropout 0.25 changes y0 by 0.0")
    _, too_often = results(LORA, 0.6)
    assert str(check_dropout(LORA, target, too_often)).startswith("wrong: dropout 0.25 changes")


class Counter:
    """A device on which the n-th sample takes n seconds."""

    def __init__(self) -> None:
        self.order: list[str] = []

    def seconds(self, timed: Timed, *, cold: bool) -> float:
        assert cold
        self.order.append(timed.run(timed.prepare()))
        return float(len(self.order))

    def peak_bytes(self, timed: Timed) -> int:
        return len(timed.run(timed.prepare()))


def test_variants_take_turns_in_random_order() -> None:
    timed = {name: Timed(lambda: None, lambda _, name=name: name) for name in "abcd"}
    device = Counter()
    plan = Plan(least=3, most=20, warm_up=2, budget_s=60, cold=True, seed=1)
    found = sample(device, timed, plan)
    warm_up, rounds = device.order[:8], [device.order[8 + i : 12 + i] for i in range(0, 80, 4)]
    assert warm_up == list("aabbccdd")
    assert all(sorted(turn) == list("abcd") for turn in rounds)
    assert len({tuple(turn) for turn in rounds}) > 10
    assert all(len(found[name].seconds) == 20 and found[name].peak_bytes == 1 for name in "abcd")
    again = Counter()
    sample(again, timed, plan)
    assert again.order == device.order


def test_a_spent_budget_ends_after_the_least_number_of_rounds() -> None:
    timed = {"a": Timed(lambda: None, lambda _: "a")}
    plan = Plan(least=3, most=20, warm_up=0, budget_s=0, cold=True, seed=0)
    assert len(sample(Counter(), timed, plan)["a"].seconds) == 3


def test_a_variant_that_fails_late_loses_its_samples_and_the_others_go_on() -> None:
    calls = iter(range(100))

    def run(_: None) -> str:
        if next(calls) == 4:
            raise RuntimeError("device-side assert\nand much more")
        return "a"

    timed = {"a": Timed(lambda: None, run), "b": Timed(lambda: None, lambda _: "b")}
    found = sample(Counter(), timed, Plan(5, 5, 1, 60, True, 0))
    assert (found["a"].status, found["a"].seconds) == ("failed: RuntimeError: device-side assert", [])
    assert (found["b"].status, len(found["b"].seconds)) == ("ok", 5)


def test_a_failure_is_one_line_and_refused_memory_is_told_apart() -> None:
    def refuse(message: str) -> None:
        raise RuntimeError(message)

    assert attempt(lambda: 3) == (3, "ok")
    refused = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."
    assert attempt(partial(refuse, refused)) == (None, OUT_OF_MEMORY)
    assert attempt(partial(refuse, "no kernel\nsecond line")) == (None, "failed: RuntimeError: no kernel")
    with pytest.raises(KeyboardInterrupt):
        attempt(partial(_raise, KeyboardInterrupt()))


def _raise(error: BaseException) -> None:
    raise error


def test_operations_and_ideal_bytes_of_a_case() -> None:
    """By hand: M 2, N 3 + 5, K 64, r 4, bf16."""
    case = Case("lora_linear_group", "tiny", "x", "16-bit", "bf16", 2, (3, 5), 64, rank=4)
    thin = 2 * 4 * (3 + 5) + 2 * 8 * 64
    factors = 4 * (4 * 8 + 8 * 64)
    assert case.flops("forward") == 2 * (2 * 8 * 64 + thin)
    assert case.flops("backward") == 2 * (2 * 8 * 64 + 2 * thin)
    forward = 2 * 8 * 64 + factors + 2 * 2 * (64 + 8)
    assert case.ideal_bytes("forward") == forward
    assert case.ideal_bytes("backward") == forward + factors + 2 * 2 * (64 + 8)
    assert case.flops("forward+backward") == case.flops("forward") + case.flops("backward")
    assert replace(HEAD, rows=2).flops("forward+backward") == 2 * replace(HEAD, rows=2).flops("forward")


def test_the_suite_holds_every_op_and_the_ragged_rows() -> None:
    whole = list(cases(OPS, list(MODELS), (137, 16384), "bf16", quick=False))
    assert {case.op for case in whole} == set(OPS)
    assert len(whole) == len(set(whole))
    quick = list(cases(OPS, ["0.5B"], (128,), "bf16", quick=True))
    assert {case.op for case in quick} == set(OPS)
    assert len(quick) < len(whole) / 5
    assert all(case.inner % 64 == 0 for case in whole)  # rows are whole blocks of NF4


def test_the_roofline_is_the_longer_of_its_two_parts() -> None:
    rates = rates_of("NVIDIA GeForce RTX 4090")
    assert rates is not None
    assert roofline_seconds(rates, "bf16", 165.2e12, 1008e6) == 1
    assert roofline_seconds(rates, "fp32", 1, 2 * 1008e9) == 2
    assert rates_of("NVIDIA H100 PCIe") != rates_of("NVIDIA H100 80GB HBM3")
    assert rates_of("AMD EPYC") is None


def test_a_row_without_a_speed_has_its_reason_below_the_table() -> None:
    row: dict[str, Any] = {"op": "linear_logprob", "model": "m", "part": "head", "base": "16-bit", "rows": 5}
    row |= {"variant": "TRL", "status": "wrong: dh is off by 3"}
    assert cells(row, True) == ["5", "TRL", "–", "–", "wrong", "–", "–"]
    assert len(columns([row])) == 6
    assert len(columns([row | {"roofline_share": 0.5}])) == 7
    assert notes([row, row, row | {"rows": 6}]) == [
        "TRL: wrong: dh is off by 3 (linear_logprob m head 16-bit M 5 and 1 more)"
    ]


def test_clocks_are_empty_without_a_gpu_or_one_entry_for_each() -> None:
    assert len(gpu_clocks()) >= torch.cuda.device_count()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_quick_suite_on_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    result = CliRunner().invoke(app, ["bench", "kernels", "--quick", "--out", str(out)])
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert report["protocol"]["clock"] == "CUDA events"
    assert report["provenance"]["machine"]["gpus"]
    mine = [row for row in report["rows"] if row["variant"].startswith("qtrain")]
    assert {row["status"] for row in mine} == {"ok"}
    assert all(row["n"] >= 30 for row in mine)
    assert PEFT_4BIT in {row["variant"] for row in report["rows"] if row["status"] == "ok"}
