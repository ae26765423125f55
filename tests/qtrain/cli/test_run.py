"""`qtrain run` and `qtrain env` as a user calls them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.qtrain.tiny import save_tiny_base, write_rows

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    save_tiny_base(folder / "base")
    write_rows(
        folder / "rows.jsonl", [{"instruction": f"week {n}", "output": f"total {n}"} for n in range(12)]
    )
    (folder / "bad.jsonl").write_text(
        '{"instruction": "a", "output": "b"}\n{"instruction": "a", "output": ""}\nno json\n'
    )
    return folder


def _qtrain(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    import os

    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, "-m", "qtrain", *words],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_is_quick(place: Path) -> None:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = _qtrain(place, "--help")
        times.append(time.perf_counter() - start)
        assert done.returncode == 0
    # the promise is half a second; the rest is for a machine that is busy with other tests
    assert min(times) < 2


def test_a_run_and_its_errors(place: Path) -> None:
    words = [
        "run",
        "--4bit",
        "--model",
        "base",
        "--data",
        "rows.jsonl",
        "--set",
        "training.max_steps=2",
        "--set",
        "adapter.r=4",
    ]
    done = _qtrain(place, *words)
    assert done.returncode == 0, done.stderr
    assert "finished runs/v1: step 2" in done.stdout
    assert (place / "runs/v1/adapter/adapter_model.safetensors").is_file()
    again = _qtrain(place, *words, "--out", "runs/v1")
    assert again.returncode == 2
    assert (
        again.stderr.strip()
        == "error: runs/v1 exists already (finished); --resume goes on with it, --out names another"
    )
    resumed = _qtrain(place, "run", "--resume", "--out", "runs/v1")
    assert resumed.returncode == 0
    assert "nothing to do" in resumed.stdout
    other = _qtrain(
        place, "run", "--resume", "--out", "runs/v1", "--model", "base", "--set", "training.max_steps=3"
    )
    assert other.returncode == 2
    assert "training.max_steps: 2 -> 3" in other.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "nowhere.yaml"], "there is no recipe nowhere.yaml"),
        (["run", "--model", "base", "--data", "rowz.jsonl"], "rows.jsonl"),
        (["run", "--model", "./bas", "--data", "rows.jsonl"], "there is no folder ./bas"),
        (["run", "--model", "base", "--data", "rows.jsonl", "--method", "ppo"], "training.method is 'ppo'"),
        (["run", "--model", "base", "--data", "rows.jsonl", "--method", "dpo"], "rows.jsonl"),
        (
            ["run", "--model", "base", "--data", "rows.jsonl", "--from", "runs/v99"],
            "runs/v99 is not a run directory",
        ),
        (["run", "--model", "base", "--data", "bad.jsonl"], "bad.jsonl:3"),
        (["run", "--resume", "--out", "runs/v99"], "runs/v99 is not a run directory"),
    ],
)
def test_a_mistake_is_told_without_a_traceback(place: Path, words: list[str], message: str) -> None:
    done = _qtrain(place, *words)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_bad_rows_are_told_before_anything_is_trained_or_left(place: Path) -> None:
    done = _qtrain(place, "run", "--model", "base", "--data", "bad.jsonl", "--out", "runs/bad")
    assert "bad.jsonl:2" in done.stderr
    assert "bad.jsonl:3" in done.stderr
    assert not (place / "runs" / "bad").exists()


def test_dry_run_shows_everything_and_writes_nothing(place: Path) -> None:
    before = sorted(place.rglob("*"))
    done = _qtrain(
        place, "run", "--dry-run", "--4bit", "--model", "base", "--data", "rows.jsonl", "--out", "runs/dry"
    )
    assert done.returncode == 0, done.stderr
    for words in (
        "12 rows",
        "week 0",
        "learning_rate: 0.0001",
        "trainable parameters: ",
        "nothing was trained",
    ):
        assert words in done.stdout
    assert sorted(place.rglob("*")) == before


def test_env_names_every_op_and_why(place: Path) -> None:
    done = _qtrain(place, "env", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {entry["op"] for entry in found["ops"]} >= {"linear_logprob", "lora_linear"}
    assert all(entry["backend"] and entry["reason"] for entry in found["ops"])
    assert found["versions"]["torch"]
