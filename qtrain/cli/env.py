"""`qtrain env`: versions, devices, and which backend every op would use and why."""

from __future__ import annotations

import json as json_module
from typing import Annotated, Any

import typer

from .terminal import console


def env(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, devices, and which kernel backend each op would use and why."""
    from qtrain.cache import cache_folder
    from qtrain.kernels import backends
    from qtrain.model.devices import choose_compute
    from qtrain.recipe.schema import ModelSettings
    from qtrain.runs.manifest import machine, versions

    compute = choose_compute(ModelSettings())
    found: dict[str, Any] = {
        "versions": versions(),
        "machine": machine(),
        "compute": {
            "device": str(compute.device),
            "dtype": str(compute.dtype).removeprefix("torch."),
            "reason": compute.reason,
        },
        "ops": [
            {"op": choice.op, "backend": choice.backend, "reason": choice.reason}
            for choice in backends(compute.device.type)
        ],
        "cache": str(cache_folder()),
    }
    if json:
        typer.echo(json_module.dumps(found, indent=2))
        return
    _tables(found)


def _tables(found: dict[str, Any]) -> None:
    from rich.table import Table

    say = console()
    for title, rows in (
        ("versions", _rows(found["versions"])),
        ("machine", _rows(found["machine"])),
        ("compute", _rows(found["compute"])),
    ):
        table = Table(title=title, title_justify="left", show_header=False, box=None)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(name, value)
        say.print(table)
        say.print()
    table = Table("op", "backend", "reason", title="kernels", title_justify="left", box=None)
    for entry in found["ops"]:
        table.add_row(entry["op"], entry["backend"], entry["reason"])
    say.print(table)


def _rows(section: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (str(name), "not installed" if value is None else "none" if value == [] else str(value))
        for name, value in section.items()
    ]
