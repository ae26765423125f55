"""A tiny base model, rows for it, and a short way to a recipe and a run."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qtrain.recipe.load import load_recipe
from qtrain.recipe.schema import Recipe
from qtrain.training.run import Outcome, train
from tests.qtrain.tiny import save_tiny_base, write_rows

WORDS = ["total", "growth", "week", "city", "Berlin", "Paris", "sales", "report", "table", "JSON", "12", "7"]


def _text(generator: random.Random, low: int, high: int) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(generator.randint(low, high)))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def sft_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = random.Random(0)
    rows = [{"instruction": _text(generator, 2, 9), "output": _text(generator, 1, 12)} for _ in range(24)]
    return write_rows(tmp_path_factory.mktemp("rows") / "sft.jsonl", rows)


@pytest.fixture(scope="session")
def dpo_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = random.Random(1)
    rows = [
        {
            "prompt": _text(generator, 2, 9),
            "chosen": _text(generator, 1, 9),
            "rejected": "bad " + _text(generator, 1, 9),
        }
        for _ in range(16)
    ]
    return write_rows(tmp_path_factory.mktemp("rows") / "dpo.jsonl", rows)


MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def make_recipe(base: Path, sft_file: Path, dpo_file: Path, tmp_path: Path) -> MakeRecipe:
    """A recipe of the tiny model, in fp32; keywords are keys with `__` for the dot."""

    def make(name: str = "run", method: str = "sft", **changes: Any) -> Recipe:
        keys: dict[str, Any] = {
            "model.name": base,
            "model.compute_dtype": "fp32",
            "adapter.r": 4,
            "adapter.dropout": 0.0,
            "data.train": [str(sft_file if method == "sft" else dpo_file)],
            "training.method": method,
            "training.batch_size": 4,
            "training.gradient_accumulation": 1,
            "training.max_steps": 5,
            "training.learning_rate": 0.01,
            "training.save_every": 5,
            "out": tmp_path / name,
        }
        keys |= {key.replace("__", "."): value for key, value in changes.items()}
        return load_recipe(None, [f"{key}={json.dumps(value, default=str)}" for key, value in keys.items()])

    return make


def do_run(recipe: Recipe, *, resume: bool = False) -> tuple[Outcome, str]:
    """Train in this process; returns the outcome and what was printed."""
    text = io.StringIO()
    outcome = train(recipe, resume=resume, console=Console(file=text, width=200))
    return outcome, text.getvalue()


def metrics(recipe: Recipe) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    assert recipe.out is not None
    return [json.loads(line) for line in (recipe.out / "metrics.jsonl").read_text().splitlines()]


def losses(recipe: Recipe) -> list[float]:
    """The training losses, step by step."""
    return [line["loss"] for line in metrics(recipe) if "loss" in line]


def adapter_bytes(recipe: Recipe) -> bytes:
    """The final adapter's weights file."""
    assert recipe.out is not None
    return (recipe.out / "adapter" / "adapter_model.safetensors").read_bytes()
