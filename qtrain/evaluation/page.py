"""The comparison as one self-contained HTML file: no script, no network, everything escaped."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from qtrain.errors import UserError
from qtrain.runs.atomic import disk_errors, write_text

from .figures import difference_text, interval_text, short_source, value_text


def render_page(result: Mapping[str, Any]) -> str:
    """HTML of a `compare_subjects` result."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "value": value_text,
        "interval": interval_text,
        "difference": difference_text,
        "bar": _bar,
        "source": short_source,
    }
    template = files("qtrain.evaluation").joinpath("compare.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(result)


def write_page(result: Mapping[str, Any], path: Path) -> None:
    """Render to a file, whole or not at all."""
    with disk_errors("the page", path):
        write_text(path, render_page(result))


def prepare_place(path: Path, option: str) -> None:
    """Make the folder of an output file, before the work whose result goes there.

    Raises:
        UserError: the path is a folder.
        QtrainError: its folder can't be made.
    """
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder; name a file in it, such as {path / 'result'}")
    with disk_errors("a result", path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)


def _bar(interval: Mapping[str, Any]) -> str:
    """CSS places of a share and its interval on a scale from 0 to 100 %."""
    mean, low, high = (100 * float(interval[key]) for key in ("mean", "low", "high"))
    return f"--mean:{mean:.2f}%;--low:{low:.2f}%;--span:{max(high - low, 0.4):.2f}%"
