"""`qtrain run`: from recipe and flags to one run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qtrain.errors import UserError

from .terminal import console

if TYPE_CHECKING:
    from qtrain.recipe.schema import Recipe


def run(
    recipe: Annotated[
        Path | None, typer.Argument(help="Recipe (YAML). Without one: the demo's.", show_default=False)
    ] = None,
    four_bit: Annotated[
        bool, typer.Option("--4bit", help="Hold the base in NF4 (model.quantization=nf4).")
    ] = False,
    model: Annotated[str | None, typer.Option(help="Base model: hub name, folder, or demo.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="Rows to learn from; may be given again.")] = None,
    method: Annotated[str | None, typer.Option(help="sft or dpo.")] = None,
    parent: Annotated[Path | None, typer.Option("--from", help="Go on from this run's adapter.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory (default: the next free runs/vN).")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and show everything, train nothing.")
    ] = False,
    limit: Annotated[int | None, typer.Option(help="Only the first N rows: the small trial.")] = None,
) -> None:
    """Fine-tune a model: SFT, or DPO on top of it.

    qtrain run --4bit                       the demo, on whatever machine this is
    qtrain run --4bit --model Qwen/Qwen2.5-7B-Instruct --data mine.jsonl
    qtrain run --4bit --method dpo --from runs/v1 --data pairs.jsonl
    """
    flags = {
        "model.quantization": "nf4" if four_bit else None,
        "model.name": model,
        "data.train": data or None,
        "training.method": method,
        "parent": None if parent is None else str(parent),
        "out": None if out is None else str(out),
        "limit": limit,
    }
    flags = {key: value for key, value in flags.items() if value is not None}
    if resume:
        chosen = _resumed(recipe, flags, set_ or [])
    else:
        chosen = resolve(recipe, flags, set_ or [])
    if dry_run:
        from .dry_run import show

        show(chosen, console())
        return
    from qtrain.training.run import train

    outcome = train(chosen, resume=resume, console=console())
    if outcome.state == "finished":
        _say_finished(outcome)


def resolve(path: Path | None, flags: dict[str, Any], overrides: list[str]) -> Recipe:
    """The recipe that a command line means.

    Without a recipe: the demo's, unless a model is named; with --from, the parent's model and adapter.

    Raises:
        UserError: see `load_recipe`.
    """
    from qtrain.recipe.load import load_recipe, load_tree

    tree: dict[str, Any] = {}
    if path is not None:
        tree = load_tree(path)
    elif flags.get("model.name", "demo") == "demo" and not _parent_is_no_demo(flags):
        tree = _demo_tree(str(flags.get("training.method", "sft")), own_data="data.train" in flags)
    parent = flags.get("parent") or tree.get("parent")
    if parent is not None:
        tree |= _from_parent(Path(str(parent)), tree)
    for key, value in flags.items():
        section, _, name = key.rpartition(".")
        place = tree.setdefault(section, {}) if section else tree
        place[name] = value
    chosen = load_recipe(path, overrides, tree)
    return chosen.model_copy(update={"out": chosen.out or _next_free()})


def _demo_tree(method: str, own_data: bool) -> dict[str, Any]:
    from importlib.resources import files

    import yaml

    name = "dpo.yaml" if method == "dpo" else "sft.yaml"
    tree: dict[str, Any] = yaml.safe_load(files("qtrain.demo").joinpath(name).read_text(encoding="utf-8"))
    if own_data:
        tree.pop("limit", None)
        tree["data"] = {
            key: value for key, value in tree.get("data", {}).items() if key not in ("train", "eval")
        }
    return tree


def _parent_is_no_demo(flags: dict[str, Any]) -> bool:
    if "parent" not in flags:
        return False
    return bool(_parent_recipe(Path(flags["parent"])).model.name != "demo")


def _parent_recipe(path: Path) -> Recipe:
    from qtrain.recipe.load import load_recipe
    from qtrain.runs.rundir import finished_run

    return load_recipe(finished_run(path).recipe, [])


def _from_parent(parent: Path, tree: dict[str, Any]) -> dict[str, Any]:
    """Model and adapter of the parent, for what the tree does not say itself."""
    theirs = _parent_recipe(parent).model_dump(mode="json")
    return {section: theirs[section] | tree.get(section, {}) for section in ("model", "adapter")}


def _next_free() -> Path:
    number = 1
    while Path(f"runs/v{number}").exists():
        number += 1
    return Path(f"runs/v{number}")


def _resumed(path: Path | None, flags: dict[str, Any], overrides: list[str]) -> Recipe:
    """The stored recipe of the run; flags that would change it are refused."""
    from qtrain.recipe.load import differences, load_recipe
    from qtrain.runs.rundir import open_run

    given = path is not None or overrides or set(flags) - {"out"}
    asked = resolve(path, flags, overrides) if given else None
    place = (
        flags.get("out") or (asked.out if path is not None and asked is not None else None) or _newest_run()
    )
    folder = Path(str(place))
    stored = load_recipe(open_run(folder).recipe, []).model_copy(update={"out": folder})
    if asked is not None:
        changed = differences(stored, asked, ignore=("out",))
        if changed:
            raise UserError(
                f"--resume goes on with the recipe stored in {folder}, which differs: {'; '.join(changed)}; "
                "leave those out, or start a new run"
            )
    return stored


def _newest_run() -> Path:
    found = [path.parent for path in Path("runs").glob("*/recipe.yaml")] if Path("runs").is_dir() else []
    if not found:
        raise UserError("--resume: there is no run in runs/; name one with --out")
    return max(
        found,
        key=lambda folder: (
            (folder / "status.json").stat().st_mtime if (folder / "status.json").exists() else 0.0
        ),
    )


def _say_finished(outcome: Any) -> None:
    figures = outcome.figures
    parts = [f"step {outcome.step}"]
    parts += [f"final loss {figures['final_loss']:.4f}"] if figures.get("final_loss") is not None else []
    parts += [f"held-out loss {figures['eval_loss']:.4f}"] if "eval_loss" in figures else []
    say = console()
    say.print(
        f"[green]finished[/green] {outcome.run.path}: {', '.join(parts)}", highlight=False, soft_wrap=True
    )
    path = outcome.run.path
    say.print(
        f"next: qtrain eval {path} · qtrain compare BASE {path} · qtrain chat {path}",
        style="dim",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
