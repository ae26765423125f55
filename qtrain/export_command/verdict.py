"""What the gate measured, for people."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from qtrain.export.verify import Verdict

from .rows import Windows


def show_verdict(verdict: Verdict, windows: Windows, console: Console) -> None:
    """A line for each figure with its bound."""
    found, bounds = verdict.agreement, verdict.bounds
    kind = "held-out" if windows.held_out else "calibration"
    console.print(
        f"quantised against 16 bits, {found.positions} {kind} tokens:", highlight=False, markup=False
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("", "measured", "bound"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row("KL (nats)", f"{found.kl:.4f}", _most(bounds.kl if bounds else None))
    table.add_row(
        f"perplexity {found.perplexity_p:.3f} -> {found.perplexity_q:.3f}",
        f"x {verdict.perplexity_ratio:.4f}",
        _most(bounds.ppl if bounds else None),
    )
    table.add_row("same likeliest token", f"{found.top1:.2%}", _least(bounds.top1 if bounds else None))
    if verdict.stops is not None:
        stops = verdict.stops
        table.add_row(
            f"answers end, of {stops.places}",
            f"{stops.p} -> {stops.q}",
            "" if bounds is None else f">= {bounds.stops:g} x {stops.p}",
        )
    console.print(table, highlight=False, markup=False)


def _most(bound: float | None) -> str:
    return "off" if bound is None else f"<= {bound:g}"


def _least(bound: float | None) -> str:
    return "" if not bound else f">= {bound:g}"


def say(console: Console, line: str) -> None:
    """A line as it is."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def warn(console: Console, line: str) -> None:
    """A line that should not be missed."""
    console.print(f"warning: {line}", style="yellow", markup=False, highlight=False, soft_wrap=True)
