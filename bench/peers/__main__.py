"""`python -m qtrain.bench.peers install NAME...` and `... list`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .environments import CACHE, PeerError, find_peer, peer_names

app = typer.Typer(add_completion=False, help="The peers' environments, one folder each.")
CacheOption = Annotated[Path, typer.Option(help="Folder that holds peers/NAME.")]


@app.command()
def install(
    names: Annotated[list[str], typer.Argument(help=f"Any of: {', '.join(peer_names())}.")],
    cache: CacheOption = CACHE,
    missing: Annotated[bool, typer.Option("--missing", help="Leave those that are installed.")] = False,
) -> None:
    """Make the environments anew from their pins (some minutes and 1.5 to 3.5 GB each)."""
    console = Console(stderr=True)
    try:
        for peer in [find_peer(name, cache) for name in names]:
            if missing and not peer.missing():
                continue
            peer.install(lambda line: console.print(line, highlight=False, markup=False))
    except PeerError as error:
        console.print(str(error), style="red", highlight=False, markup=False)
        raise typer.Exit(1) from None


@app.command("list")
def list_peers(cache: CacheOption = CACHE) -> None:
    """Say which are installed."""
    console = Console()
    for name in peer_names():
        console.print(
            f"{name}: {find_peer(name, cache).missing() or 'installed'}", highlight=False, markup=False
        )


if __name__ == "__main__":
    app()
