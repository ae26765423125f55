"""Consoles and the few ways in which every command speaks."""

from __future__ import annotations

import sys

from rich.console import Console


def console() -> Console:
    """Where results go (stdout)."""
    return Console()


def print_error(error: Exception) -> None:
    """`error: ...` on stderr, never wrapped, so that it can be searched for."""
    place = Console(stderr=True)
    place.print("[bold red]error:[/bold red] ", end="", highlight=False)
    place.print(str(error), markup=False, highlight=False, soft_wrap=True)


def interactive() -> bool:
    """Whether a person is at the other end."""
    return sys.stdin.isatty() and sys.stdout.isatty()
