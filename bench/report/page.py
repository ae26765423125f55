"""The page: one HTML file that asks the network for nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.resources import files

from markupsafe import Markup

from .source import Source

SHOWN, FOLDED = 4, 40  # cases by tokens: open, and in all


def render(source: Source) -> str:
    """HTML of everything that the files hold."""
    from jinja2 import Environment, StrictUndefined

    from . import by_tokens, curves, headline, quality, raw, roofline, timings

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    growths = by_tokens.memory(source)
    return environment.from_string(_text("page.html.j2")).render(
        style=Markup(_text("style.css.j2")),
        script=Markup(_text("sort.js.j2")),
        notes=list(_notes(source)),
        headlines=headline.lines(source),
        groups=list(timings.groups(source)),
        growths=growths[:SHOWN],
        more_growths=growths[SHOWN:FOLDED],
        rooflines=roofline.rooflines(source),
        quality=quality.quality(source),
        methods=list(curves.methods(source)),
        raw=raw.table(source),
        origins=list(raw.origins(source)),
    )


def _text(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _notes(source: Source) -> Iterator[str]:
    """What a reader has to know before any figure."""
    machines = dict.fromkeys(_machine(one.setting) for one in source.results if one.setting)
    yield "Measured on " + "; ".join(machines) + "." if machines else "Nothing here was timed."
    if not source.timed_on_gpu:
        yield "Nothing here was timed on a GPU: what is said of kernels on GPUs is read from compiled code."
    dirty = [one.path.name for one in source.results if (one.provenance.get("source") or {}).get("dirty")]
    if dirty:
        yield f"Made with uncommitted changes: {', '.join(dirty)}."


def _machine(setting: Mapping[str, str]) -> str:
    parts = [setting.get("CPU", "an unnamed CPU")]
    if setting.get("GPU", "none") != "none":
        parts.append(setting["GPU"])
    if "threads" in setting:
        parts.append(f"{setting['threads']} threads")
    return ", ".join(parts)
