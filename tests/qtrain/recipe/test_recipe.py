"""Recipes: strict, with one line for every mistake, and what a command line makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from qtrain.cli.run import resolve
from qtrain.errors import UserError
from qtrain.recipe.load import differences, dump_recipe, load_recipe, recipe_keys
from qtrain.recipe.schema import Recipe

ROOT = Path(__file__).parents[3]


def _write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {quantisation: 4}", r"yaml:1: unknown key model\.quantisation; .* model\.quantization\?"),
        ("training:\n  lerning_rate: 1", r"yaml:2: unknown key training\.lerning_rate; .*\.learning_rate\?"),
        ("trainin: {}", r"unknown key trainin; did you mean training\?"),
        ("learning_rate: 1e-4", r"did you mean training\.learning_rate\?"),
        ("training: {learning_rate: 7}", r"training\.learning_rate is 7: input should be less than 1"),
        ("training: {learning_rate: .nan}", r"training\.learning_rate is nan"),
        ("training: {method: spo}", r"training\.method is 'spo': input should be 'sft' or 'dpo'"),
        ("training: {batch_size: 0}", r"training\.batch_size is 0: .*greater than or equal to 1"),
        ("training: {batch_size: two}", r"training\.batch_size is 'two'"),
        ("model: 7", "model is 7: it is a section"),
        ("data: {train: []}", r"data\.train is empty: name at least one file"),
        ("- a", "a recipe is a mapping of sections, this is a list"),
        ("model: {name: [", "recipe.yaml:1: not valid YAML"),
        ("seed: 1\nseed: 2", "recipe.yaml:2: not valid YAML: the key seed is there twice"),
        ("adapter: {target_modules: all_linear}", r"'all_linear'; did you mean all-linear\?"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        load_recipe(_write(tmp_path, text), [])
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


def test_a_missing_recipe_names_its_neighbour(tmp_path: Path) -> None:
    _write(tmp_path, "")
    with pytest.raises(
        UserError, match=r"there is no recipe .*/recipy\.yaml; did you mean .*/recipe\.yaml\?"
    ):
        load_recipe(tmp_path / "recipy.yaml", [])


def test_overrides_win_and_are_read_as_yaml(tmp_path: Path) -> None:
    path = _write(tmp_path, "training: {learning_rate: 1e-4}\nkernels: off")
    recipe = load_recipe(
        path, ["training.learning_rate=3e-5", "adapter.target_modules=[k_proj]", "data.train=a.jsonl"]
    )
    assert recipe.training.learning_rate == 3e-5
    assert recipe.adapter.target_modules == ["k_proj"]
    assert recipe.data.train == ["a.jsonl"]
    assert recipe.kernels == "off"  # which YAML reads as false


@pytest.mark.parametrize("override", ["training.learning_rate", "=3", "training.learning_rate.x=1", "a: b"])
def test_a_bad_override_is_one_line(override: str) -> None:
    with pytest.raises(UserError, match=r"--set|unknown key|training\.learning_rate is"):
        load_recipe(None, [override])


def test_what_is_written_out_reads_back_the_same(tmp_path: Path) -> None:
    recipe = load_recipe(None, ["adapter.target_modules=all-linear", "limit=3", "parent=runs/v1"])
    assert load_recipe(_write(tmp_path, dump_recipe(recipe)), []) == recipe
    assert differences(recipe, recipe) == []
    other = load_recipe(None, ["limit=4"])
    assert "limit: 3 -> 4" in differences(recipe, other)


def test_every_key_is_described_or_plain() -> None:
    keys = list(recipe_keys())
    assert "training.learning_rate" in keys
    assert len(keys) == len(set(keys)) > 40


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_the_examples_are_valid(path: Path) -> None:
    recipe = load_recipe(path, [])
    assert recipe.model.name.startswith("Qwen/Qwen2.5")


def test_without_a_recipe_it_is_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = resolve(None, {"model.quantization": "nf4"}, [])
    assert (recipe.model.name, recipe.model.quantization, recipe.data.train) == ("demo", "nf4", ["demo"])
    with pytest.raises(UserError, match="runs/demo-sft is not a run directory"):
        resolve(None, {"training.method": "dpo"}, [])  # the demo's DPO goes on from its SFT


def test_with_a_model_it_is_the_general_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = resolve(None, {"model.name": "Qwen/Qwen2.5-7B-Instruct", "data.train": ["mine.jsonl"]}, [])
    assert (recipe.adapter.r, recipe.adapter.alpha, recipe.adapter.dropout) == (64, 128, 0.05)
    assert recipe.adapter.target_modules == ["q_proj", "v_proj"]
    assert (recipe.data.train, recipe.data.eval) == (["mine.jsonl"], [])
    assert recipe.out == Path("runs/v1")


def test_the_next_free_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "v1").mkdir(parents=True)
    assert resolve(None, {"model.name": "a/b"}, []).out == Path("runs/v2")


def test_from_takes_model_and_adapter_of_the_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qtrain.runs.rundir import RunDir

    monkeypatch.chdir(tmp_path)
    parent = load_recipe(None, ["model.name=a/b", "model.quantization=nf4", "adapter.r=8"])
    run = RunDir(tmp_path / "runs" / "v1")
    run.path.mkdir(parents=True)
    run.recipe.write_text(dump_recipe(parent))
    run.set_status("stopped", step=3)
    with pytest.raises(UserError, match="is stopped, not finished; go on with: qtrain run --resume"):
        resolve(None, {"parent": "runs/v1"}, [])
    run.set_status("finished", step=3)
    recipe = resolve(None, {"parent": "runs/v1", "training.method": "dpo", "data.train": ["p.jsonl"]}, [])
    assert (recipe.model, recipe.adapter) == (parent.model, parent.adapter)
    assert recipe.training.learning_rate == Recipe().training.learning_rate
