"""Killed, stopped, damaged, out of disk: what is left, and that going on from it is exact."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qtrain.errors import QtrainError, UserError
from qtrain.recipe.load import dump_recipe
from qtrain.recipe.schema import Recipe
from qtrain.runs.atomic import damage, write_checksums
from qtrain.training.checkpoint import latest_complete, list_checkpoints

from .conftest import MakeRecipe, adapter_bytes, do_run, losses

# Runs a recipe and kills its own process, hard, right after the metrics line of a step.
KILLED_AT = """
import os, signal, sys
from qtrain.training import callbacks
write, last_step = callbacks.MetricsFile.on_log, int(sys.argv[2])
def write_then_die(self, args, state, control, logs=None, **kwargs):
    write(self, args, state, control, logs=logs, **kwargs)
    if state.global_step == last_step:
        os.kill(os.getpid(), signal.SIGKILL)
callbacks.MetricsFile.on_log = write_then_die
sys.argv = ["qtrain", "run", sys.argv[1]]
from qtrain.cli import main
main()
"""


def _recipe_file(recipe: Recipe, folder: Path) -> Path:
    path = folder / f"{recipe.out.name}.yaml"
    path.write_text(dump_recipe(recipe))
    return path


def _environment() -> dict[str, str]:
    root = Path(__file__).parents[3]
    return {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_kill_9_and_resume_is_exact(make_recipe: MakeRecipe, tmp_path: Path, method: str) -> None:
    changes = {"training__max_steps": 10, "training__batch_size": 2, "training__gradient_accumulation": 2}
    changes |= {"adapter__dropout": 0.1, "model__quantization": "nf4"}
    whole, broken = make_recipe("whole", method, **changes), make_recipe("broken", method, **changes)
    do_run(whole)
    died = subprocess.run(
        [sys.executable, "-c", KILLED_AT, str(_recipe_file(broken, tmp_path)), "7"],
        env=_environment(),
        capture_output=True,
    )
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    assert [path.name for path in list_checkpoints(broken.out / "checkpoints")] == ["checkpoint-5"]
    _, said = do_run(broken, resume=True)
    assert "resuming from checkpoint-5" in said
    assert losses(broken) == losses(whole)
    assert adapter_bytes(broken) == adapter_bytes(whole)


def test_resume_of_a_finished_run_does_nothing(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("done")
    do_run(recipe)
    files = {path: path.stat().st_mtime_ns for path in recipe.out.rglob("*") if path.is_file()}
    outcome, said = do_run(recipe, resume=True)
    assert outcome.state == "already finished"
    assert "is finished (step 5): nothing to do" in said
    assert files == {path: path.stat().st_mtime_ns for path in recipe.out.rglob("*") if path.is_file()}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_stops_cleanly(
    make_recipe: MakeRecipe, tmp_path: Path, number: signal.Signals
) -> None:
    changes = {"training__max_steps": 300, "training__save_every": 1000}
    whole, stopped = make_recipe("whole", **changes), make_recipe("stopped", **changes)
    process = subprocess.Popen(
        [sys.executable, "-m", "qtrain", "run", str(_recipe_file(stopped, tmp_path))],
        env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    metrics = stopped.out / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(number)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "Traceback" not in said
    assert "--resume" in said
    status = json.loads((stopped.out / "status.json").read_text())
    assert status["state"] == "stopped"
    assert [path.name for path in list_checkpoints(stopped.out / "checkpoints")] == [
        f"checkpoint-{status['step']}"
    ]
    do_run(stopped, resume=True)
    do_run(whole)
    assert adapter_bytes(stopped) == adapter_bytes(whole)


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("harm", [_flip_a_bit, _truncate, Path.unlink])
@pytest.mark.parametrize(
    "name",
    [
        "optimizer.pt",
        "scheduler.pt",
        "adapter_model.safetensors",
        "rng_state.pth",
        "trainer_state.json",
        "checksums.json",
    ],
)
def test_damage_is_named_and_the_checkpoint_before_it_used(tmp_path: Path, name: str, harm: object) -> None:
    names = [
        "optimizer.pt",
        "scheduler.pt",
        "adapter_model.safetensors",
        "rng_state.pth",
        "trainer_state.json",
    ]
    for step in (5, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for file in names:
            (folder / file).write_bytes(os.urandom(100))
        write_checksums(folder)
    harm(tmp_path / "checkpoint-10" / name)  # type: ignore[operator]
    said: list[str] = []
    assert latest_complete(tmp_path, said.append) == tmp_path / "checkpoint-5"
    assert len(said) == 1
    assert name in said[0]
    harm(tmp_path / "checkpoint-5" / name)  # type: ignore[operator]
    with pytest.raises(UserError, match=r"no checkpoint in .* is complete"):
        latest_complete(tmp_path, said.append)


def test_zeroed_optimizer_is_not_trained_on_with(make_recipe: MakeRecipe) -> None:
    """The whole way: the last checkpoint's optimizer is damaged, the run goes on from the one before."""
    recipe = make_recipe("run", training__max_steps=6, training__save_every=2)
    do_run(recipe)
    good = adapter_bytes(recipe)
    (recipe.out / "status.json").write_text('{"state": "running"}')
    optimizer = recipe.out / "checkpoints" / "checkpoint-6" / "optimizer.pt"
    content = bytearray(optimizer.read_bytes())
    content[2000:2064] = bytes(64)
    optimizer.write_bytes(content)
    _, said = do_run(recipe, resume=True)
    assert "checkpoint-6 is damaged" in said
    assert "optimizer.pt has changed" in said
    assert "resuming from checkpoint-4" in said
    assert adapter_bytes(recipe) == good


def test_half_a_checkpoint_never_has_its_name(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Trainer

    recipe = make_recipe("run", training__max_steps=4, training__save_every=2)

    def fail(self: object, output_dir: str) -> None:
        if "checkpoint-4" in output_dir:
            raise OSError(28, "No space left on device")
        save(self, output_dir)

    save = Trainer._save_rng_state
    monkeypatch.setattr(Trainer, "_save_rng_state", fail)
    with pytest.raises(QtrainError, match=r"disk full while writing checkpoint-4 .* free some space"):
        do_run(recipe)
    assert [path.name for path in list_checkpoints(recipe.out / "checkpoints")] == ["checkpoint-2"]
    assert damage(recipe.out / "checkpoints" / "checkpoint-2") is None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_full_disk_is_one_line_and_the_checkpoint_before_it_is_whole(
    make_recipe: MakeRecipe, small_disk: Path
) -> None:
    recipe = make_recipe(
        "run",
        out=small_disk / "run",
        adapter__r=8,
        training__max_steps=60,
        training__save_every=1,
        training__keep_checkpoints=50,
    )
    with pytest.raises(QtrainError, match="disk full while writing") as error:
        do_run(recipe)
    assert "\n" not in str(error.value)
    kept = list_checkpoints(recipe.out / "checkpoints")
    assert kept
    assert all(damage(path) is None for path in kept)


def _torchrun(recipe: Recipe, folder: Path) -> subprocess.CompletedProcess[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "qtrain", "run"]
    return subprocess.run(
        [sys.executable, *torchrun, str(_recipe_file(recipe, folder))],
        env=_environment() | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_two_processes_give_the_curve_of_one(make_recipe: MakeRecipe, tmp_path: Path, method: str) -> None:
    one = make_recipe("one", method, training__batch_size=4)
    two = make_recipe("two", method, training__batch_size=2)
    do_run(one)
    done = _torchrun(two, tmp_path)
    assert done.returncode == 0, done.stderr
    assert losses(two) == pytest.approx(losses(one), rel=2e-5)  # fp32 sums in another order


def test_fsdp_that_would_become_ddp_is_an_error(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    done = _torchrun(make_recipe("fsdp", training__fsdp=True), tmp_path)
    assert done.returncode != 0
    assert "fsdp was asked for, but accelerate made ddp of it" in done.stderr
