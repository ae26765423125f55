"""What can be evaluated: a finished run, or a base model; and loading one base for all that share it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtrain.errors import UserError
from qtrain.model.folder import packed_as
from qtrain.recipe.load import load_recipe
from qtrain.recipe.schema import DataSettings, ModelSettings
from qtrain.runs.atomic import damage
from qtrain.runs.rundir import RunDir, finished_run

if TYPE_CHECKING:
    from qtrain.model.load import Base

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to be evaluated, as it would be served."""

    name: str  # as the user gave it
    model: ModelSettings
    data: DataSettings
    run: RunDir | None = None  # None: a base model
    method: str | None = None  # of the run
    export: str | None = None  # "16-bit", "GPTQ", ...: a checkpoint that is served as it is

    @property
    def weights(self) -> str:
        """How the base's weights are held, for people."""
        if self.export is not None:
            return self.export
        return "16-bit" if self.model.quantization == "none" else self.model.quantization


def find_subject(name: str) -> Subject:
    """The run directory or base model behind a name.

    Raises:
        UserError: nothing is there, the run is not finished, or its adapter is damaged.
    """
    path = Path(name).expanduser()
    if (path / "recipe.yaml").is_file():
        return _run_subject(name, path)
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(
            f"{name} is neither a run (no recipe.yaml) nor a model (no config.json){_similar(path)}"
        )
    if path.is_file():
        raise UserError(f"{name} is a file; give a run directory or a base model")
    if not path.is_dir() and name != "demo":
        _refuse_lost_path(name, path)
    settings = ModelSettings.model_validate({"name": name})
    return Subject(name, settings, DataSettings.model_validate({}), export=_exported_as(path))


def _exported_as(folder: Path) -> str | None:
    """How the weights of an export, or of a folder that others have packed, are held."""
    packed = packed_as(folder) if folder.is_dir() else None
    if packed is not None:
        return packed
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return "16-bit" if isinstance(manifest, dict) and manifest.get("kind") == "merge" else None


def find_subjects(names: Sequence[str]) -> list[Subject]:
    """Subjects to be compared: a base model takes the quantisation and the prompt settings of the first
    run on the same base (else of the first run), so that only what is compared differs. An export has weights
    of its own, and takes the prompt settings.

    Raises:
        UserError: as `find_subject`, or a name that is there twice.
    """
    for number, name in enumerate(names):
        if name in names[:number]:
            raise UserError(f"{name} is there twice; give every run or model once")
    found = [find_subject(name) for name in names]
    runs = [subject for subject in found if subject.run is not None]
    return [subject if subject.run is not None else _like(subject, runs) for subject in found]


def _like(base: Subject, runs: list[Subject]) -> Subject:
    if base.export is not None:
        return replace(base, data=runs[0].data) if runs else base
    same = [run for run in runs if run.model.name == base.model.name]
    if same:
        return Subject(base.name, same[0].model, same[0].data)
    if runs:
        settings = runs[0].model.model_copy(update={"name": base.model.name, "revision": None})
        return Subject(base.name, settings, runs[0].data)
    return base


def _run_subject(name: str, path: Path) -> Subject:
    run = finished_run(path)
    fault = damage(run.adapter)
    if fault is not None:
        raise UserError(f"the adapter of {name} is damaged: {fault}; train the run again")
    recipe = load_recipe(run.recipe, [])
    return Subject(name, recipe.model, recipe.data, run, recipe.training.method)


def _refuse_lost_path(name: str, path: Path) -> None:
    """A name that can only have meant something on this disk is no hub name."""
    if (Path("runs") / name / "recipe.yaml").is_file():
        raise UserError(f"there is no model {name}; did you mean runs/{name}?")
    local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1
    if "/" in name and (local or path.parent.is_dir()):
        raise UserError(f"there is no run or model {name}{_similar(path)}")


def _similar(path: Path) -> str:
    names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    found = [name for name in difflib.get_close_matches(path.name, names, n=1) if name != path.name]
    return f"; did you mean {path.parent / found[0]}?" if found else "; qtrain runs lists the runs"


def open_base(subject: Subject, say: Say) -> Base:
    """Load a subject's base for inference; 4-bit weights are dequantised once where they fit."""
    from qtrain.model.load import load_base

    from .plain import dequantize_for_decoding

    base = load_base(subject.model, unpack=True)
    dequantize_for_decoding(base.model, base.compute.dtype, say)
    base.model.eval()
    return base


@contextmanager
def adapted(base: Base, subject: Subject) -> Iterator[Any]:
    """The subject's model: the base, for the block's length under the run's adapter."""
    if subject.run is None:
        yield base.model
        return
    from qtrain.model.adapter import load_adapter

    model = load_adapter(base.model, subject.run.adapter).eval()
    try:
        yield model
    finally:
        model.unload()
