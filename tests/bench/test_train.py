"""From samples to rows, absent peers, failing workers, and one tiny benchmark from end to end."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from qtrain.bench.launch import WorkerFailed, environment, run_worker
from qtrain.bench.peers.environments import PeerError, find_peer, peer_names
from qtrain.bench.provenance import provenance, source_state
from qtrain.bench.train import _plan, measure
from qtrain.bench.train_report import COLUMNS, against_best_peer, cells, long_rows
from qtrain.bench.variants import AGAIN, BASELINE, OURS, TASKS, Variant, variants
from qtrain.bench.workload import Workload
from qtrain.cli.bench import app

TINY = Workload(
    hidden_size=64,
    layers=1,
    intermediate_size=64,
    heads=2,
    kv_heads=1,
    vocab_size=1024,
    length=24,
    prompt=8,
    lora_r=8,
)


def sample(name: str, cpu: list[float], added_mib: int, status: str = "ok", turn: int = 0) -> dict[str, Any]:
    result = {
        "steps": [{"cpu_s": 99.0, "wall_s": 99.0}, *({"cpu_s": s, "wall_s": s / 2} for s in cpu)],
        "reference": {"cpu_s": 1.0, "wall_s": 0.5} if name == OURS else None,
        "baseline_bytes": 1 << 30,
        "peak_bytes": (1 << 30) + (added_mib << 20),
        "logs": [{"loss": 0.6931}],
        "settings": {},
        "versions": {},
    }
    return {
        "task": "dpo",
        "round": turn,
        "order": 0,
        **asdict(Variant(name, "ours")),
        "status": status,
        "result": result,
    }


def test_rows_hold_medians_ratios_and_no_warm_up() -> None:
    twice = [
        sample(name, cpu, added, turn=turn)
        for turn in (0, 1)
        for name, cpu, added in (
            (OURS, [2.0, 3.0, 4.0], 300),
            (AGAIN, [4.0, 4.0], 300),
            (BASELINE, [40.0], 2400),
        )
    ]
    rows = long_rows(twice, seed=0)
    trl, ours, _again = rows  # in the order of the variants, not of the samples
    assert (trl["name"], trl["verdict"], trl["reference_cpu_s"]) == (BASELINE, "baseline", None)
    assert (ours["cpu_s_p50"], ours["epoch_cpu_s_p50"], ours["n"]) == (3.0, 4.0, 6)
    assert ours["speedup"][1] == 10.0  # 40 / (3 + 1): the reference pass is counted
    assert ours["memory_ratio"] == 8.0
    assert ours["verdict"] == "faster"
    assert all(len(cells(row)) == len(COLUMNS) for row in rows)


def test_difference_within_the_noise_is_no_difference() -> None:
    once = [sample(OURS, [1.0], 300), sample(AGAIN, [4.0], 300), sample(BASELINE, [3.0], 300)]
    ours = next(row for row in long_rows([*once, *once], seed=0) if row["name"] == OURS)
    assert ours["noise_floor"] > 0
    assert ours["verdict"] == "no difference"


def test_one_process_gives_no_verdict() -> None:
    rows = long_rows([sample(OURS, [1.0, 1.1], 300), sample(BASELINE, [30.0, 31.0], 2400)], seed=0)
    ours = next(row for row in rows if row["name"] == OURS)
    assert ours["verdict"] == "one process each"
    assert cells(ours)[8] == "14.88"  # 30.5 / (1.05 + 1), without an interval


def test_best_peer_is_compared_within_a_dtype() -> None:
    fast, slow = sample("unsloth (default)", [8.0], 600), sample(BASELINE, [30.0], 2400)
    fast["worker"] = slow["worker"] = "trl"
    line = against_best_peer([sample(OURS, [1.0], 300), fast, slow], "dpo", "bf16", seed=0)
    assert line is not None
    assert line.startswith(
        "dpo, bf16: unsloth (default) takes 4.00 times the CPU time of qtrain and 2.0 times"
    )
    assert against_best_peer([sample(OURS, [1.0], 300), fast], "dpo", "fp32", seed=0) is None


def test_one_bad_process_takes_the_figures_away() -> None:
    good, bad = sample(OURS, [2.0], 300), sample(OURS, [1.0], 100, "first loss is 0.7", turn=1)
    (row,) = long_rows([good, bad], seed=0)
    assert row["status"] == "first loss is 0.7"
    assert "cpu_s_p50" not in row
    assert cells(row)[2:-1] == ["–"] * 8


def test_variants_have_unique_names_and_both_ends_of_the_comparison() -> None:
    for task in TASKS:
        names = [variant.name for variant in variants(task)]
        assert len(set(names)) == len(names)
        assert {BASELINE, OURS, AGAIN} <= set(names)


def test_an_absent_peer_is_a_row_with_the_remedy(tmp_path: Path) -> None:
    reason = Variant("TRL", "trl").missing(tmp_path)
    assert reason == "not installed: python -m qtrain.bench.peers install trl"
    peer = find_peer("trl", tmp_path)
    peer.folder.mkdir(parents=True)
    (peer.folder / "installed.json").write_text('{"requirements": "of another day"}')
    assert "installed from other pins" in str(Variant("TRL", "trl").missing(tmp_path))


def test_every_pin_is_exact() -> None:
    assert {"trl", "unsloth", "gptqmodel", "vllm"} <= set(peer_names())
    for name in peer_names():
        lines = find_peer(name).requirements.read_text().splitlines()
        pins = [line for line in lines if not line.startswith("#")]
        assert all(line.count("==") == 1 and "+" not in line for line in pins)
        assert sum(line.startswith("torch==") for line in pins) == 1
    with pytest.raises(PeerError, match=r"there is no peer 'axolotl'; there are .*trl, unsloth"):
        find_peer("axolotl")


def test_a_worker_that_crashes_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(WorkerFailed, match=r"exit code 1: .*no_such_worker"):
        run_worker(
            Path(sys.executable),
            "no_such_worker",
            folder=tmp_path,
            work=TINY,
            task="sft",
            dtype="bf16",
            options={},
            steps=1,
            threads=1,
            timeout_s=60,
        )


def test_workers_see_no_gpu_and_so_many_threads() -> None:
    values = environment(3)
    assert (values["CUDA_VISIBLE_DEVICES"], values["OMP_NUM_THREADS"], values["OMP_WAIT_POLICY"]) == (
        "",
        "3",
        "PASSIVE",
    )


def test_provenance_states_source_command_and_machine(tmp_path: Path) -> None:
    about = provenance(("torch", "no-such-package"))
    assert about["versions"]["torch"]
    assert about["versions"]["no-such-package"] is None
    assert about["machine"]["cpu"]
    assert source_state(tmp_path) == {"commit": None, "dirty": None}


@pytest.mark.slow
def test_a_tiny_benchmark_passes_its_own_gate(tmp_path: Path) -> None:
    """The first DPO step agrees with plain PyTorch, gradient included; a peer that is absent says so."""
    samples, expected = measure(
        ["dpo"],
        ["qtrain (dropout off", "TRL (fp32)"],
        rounds=1,
        steps=1,
        threads=1,
        timeout_s=300,
        work=TINY,
        cache=tmp_path,
        console=Console(quiet=True),
    )
    assert set(expected) == {"dpo", "sft", "sft-answers"}
    assert {entry["worker"]: entry["status"] for entry in samples} == {
        "ours": "ok",
        "trl": "not installed: python -m qtrain.bench.peers install trl",
    }


def test_the_command_refuses_what_is_not_there(tmp_path: Path) -> None:
    def run(*words: str) -> Any:
        return CliRunner().invoke(app, ["train", *words])

    for words, expected in (
        (["--task", "ppo"], "--task ppo: there is dpo, sft, sft-answers"),
        (["--variant", "axolotl"], "--variant axolotl: there is TRL (default)"),
        (["--out", str(tmp_path / "no" / "f.json")], "there is no folder"),
    ):
        found = run(*words)
        assert found.exit_code == 2
        assert expected in found.output.replace("\n", " ")


def test_quick_is_the_default_of_each_side_once_and_ours_again(tmp_path: Path) -> None:
    found: dict[str, Any] = {}

    def instead(tasks: list[str], chosen: list[str], **options: Any) -> tuple[list[Any], dict[str, Any]]:
        found.update(options, names=[v.name for _, _, v in _plan(tasks, chosen, 1, 0, options["exact"])])
        return [], {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qtrain.bench.train.measure", instead)
        assert CliRunner().invoke(app, ["train", "--quick"]).exit_code == 0
    assert sorted(found["names"]) == [BASELINE, OURS, AGAIN]
    assert (found["rounds"], found["steps"]) == (1, 1)
