"""Reading a recipe: YAML file, then `--set a.b=c`, then validation with one-line errors."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from qtrain.errors import UserError

from .schema import Recipe

Tree = dict[str, Any]


def load_recipe(path: Path | None, overrides: list[str], tree: Tree | None = None) -> Recipe:
    """The recipe in `path` with `a.b=value` overrides on top.

    A `tree` that was read from `path` and changed stands in for its content; errors still name its lines.

    Raises:
        UserError: a missing file, bad YAML, an unknown key (with the nearest valid one) or a bad value.
    """
    content, lines = _read(path) if path is not None else ({}, {})
    tree = content if tree is None else tree
    for override in overrides:
        _apply(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(_one_line(error, path, lines)) from None


def load_tree(path: Path) -> Tree:
    """A recipe file as it stands, not validated.

    Raises:
        UserError: a missing file or bad YAML.
    """
    return _read(path)[0]


def differences(old: Recipe, new: Recipe, ignore: tuple[str, ...] = ()) -> list[str]:
    """`key: old -> new` for every key in which two recipes differ."""
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    return [
        f"{key}: {before[key]} -> {after[key]}"
        for key in before
        if key not in ignore and before[key] != after[key]
    ]


def _flat(tree: Tree, prefix: str = "") -> Tree:
    flat: Tree = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def dump_recipe(recipe: Recipe) -> str:
    """YAML with every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def recipe_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """Every dotted key that a recipe may have."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from recipe_keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def nearest(name: str, candidates: list[str]) -> str | None:
    """The candidate that a mistyped name most likely meant; the last part of a dotted key counts most."""
    tails = {candidate.rpartition(".")[2]: candidate for candidate in reversed(candidates)}
    for pool, word in ((candidates, name), (list(tails), name.rpartition(".")[2])):
        found = difflib.get_close_matches(word, pool, n=1, cutoff=0.6)
        if found:
            return tails.get(found[0], found[0])
    return None


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML would keep the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key_node.value} is there twice", problem_mark=key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _read(path: Path) -> tuple[Tree, dict[str, int]]:
    """The tree and the line of every dotted key."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"there is no recipe {path}{_similar(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the recipe {path} can't be read: {error}") from None
    try:
        tree = yaml.load(text, Loader=_Loader)  # a SafeLoader
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise UserError(f"{path}:{mark.line + 1 if mark else 1}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    if tree is None:
        return {}, {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections, this is a {type(tree).__name__}")
    return tree, dict(_lines(node, ""))


def _similar(path: Path) -> str:
    folder = path.parent
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    found = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {folder / found[0]}?" if found else ""


def _lines(node: yaml.Node | None, prefix: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            dotted = f"{prefix}{key.value}"
            yield dotted, key.start_mark.line + 1
            yield from _lines(value, f"{dotted}.")


def _apply(tree: Tree, override: str) -> None:
    """Set one `a.b=value`; the value is read as YAML."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(f"--set {override!r}: write it as key=value, such as training.learning_rate=1e-4")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError as error:
        raise UserError(
            f"--set {override!r}: the value is not valid YAML: {str(error).splitlines()[0]}"
        ) from None
    *parents, last = key.split(".")
    place = tree
    for parent in parents:
        inner = place.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise UserError(f"--set {override!r}: {parent} is no section{_suggest(key)}")
        place[parent] = inner = dict(inner)
        place = inner
    place[last] = value


def _suggest(key: str) -> str:
    sections = [name for name, field in Recipe.model_fields.items() if isinstance(field.annotation, type)]
    found = nearest(key, [*recipe_keys(), *sections])
    return f"; did you mean {found}?" if found else "; qtrain run --dry-run prints every key"


def _one_line(error: ValidationError, path: Path | None, lines: dict[str, int]) -> str:
    problems = error.errors()
    first = problems[0]
    key = _dotted(first["loc"])
    place = f"{path}:{lines[key]}: " if path and key in lines else ""
    others = len({_dotted(problem["loc"]) for problem in problems} - {key})
    more = f" (and {others} more)" if others else ""
    return f"{place}{_describe(key, first)}{more}"


def _dotted(loc: tuple[int | str, ...]) -> str:
    """The recipe's key; what pydantic adds for the members of a union is left out."""
    parts: list[str] = []
    for part in loc:
        if (
            isinstance(part, int)
            or not (part.isidentifier() and part.islower())
            or part in ("bool", "int", "str")
        ):
            break
        parts.append(part)
    return ".".join(parts)


def _describe(key: str, problem: Any) -> str:
    value = problem.get("input")
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key}{_suggest(key)}"
    if problem["type"] == "value_error":
        return str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "model_type":
        return f"{key} is {value!r}: it is a section, with keys of its own"
    shown = repr(value) if len(repr(value)) < 80 else f"{repr(value)[:77]}..."
    message = str(problem["msg"])
    message = message[0].lower() + message[1:]
    hint = ""
    if problem["type"] == "literal_error" and isinstance(value, str):
        options = str(problem["ctx"]["expected"]).replace(" or ", ", ").replace("'", "").split(", ")
        found = difflib.get_close_matches(value, options, n=1)
        hint = f"; did you mean {found[0]}?" if found else ""
    return f"{key or 'the recipe'} is {shown}: {message}{hint}"
