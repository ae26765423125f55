"""Holding a card to `kernels/budget.toml`."""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from importlib.resources import files
from typing import Any

from .accesses import UNKNOWN
from .architectures import architecture
from .cards import Card

# of the standard library from Python 3.11 on
TOML = "tomllib" if sys.version_info >= (3, 11) else "tomli"


@cache
def budgets() -> dict[str, Any]:
    """The file as it stands."""
    text = files("qtrain.kernels").joinpath("budget.toml").read_text(encoding="utf-8")
    return dict(import_module(TOML).loads(text))


def violations(card: Card) -> list[str]:
    """What of a card is over its budget, a line each.

    Raises:
        ValueError: the card names a budget that the file doesn't have.
    """
    rules = budgets()
    if card.budget not in rules["budget"]:
        raise ValueError(f"{card.specimen}: budget {card.budget!r}, there is {', '.join(rules['budget'])}")
    return [
        *_spills(card, rules["all"]["spill_bytes"]),
        *_shared(card, rules["shared_bytes"][f"sm_{card.arch}"]),
        *_main_loop(card, rules["budget"][card.budget].get("other_per_mma")),
        *_widths(card, rules["all"]["hot_access_bits"]),
    ]


def _spills(card: Card, limit: int) -> list[str]:
    # code that addresses its stack has some even if ptxas could reuse one slot for many values
    if card.stack_bytes > limit or (limit == 0 and card.spill_stores + card.spill_loads):
        return [
            f"spills: {card.stack_bytes} bytes of stack, {card.spill_stores} STL, {card.spill_loads} LDL; "
            f"allowed are {limit} bytes"
        ]
    return []


def _shared(card: Card, limit: int) -> list[str]:
    if card.shared_bytes > limit:
        return [f"shared memory: {card.shared_bytes} bytes, allowed are {limit}"]
    return []


def _main_loop(card: Card, limit: float | None) -> list[str]:
    if limit is None or not architecture(card.arch).warp_mma:
        return []
    if card.other_per_mma is None:
        return ["main loop: no loop with tensor core instructions was found"]
    if card.other_per_mma > limit:
        return [f"main loop: {card.other_per_mma:.2f} other instructions per HMMA, allowed are {limit}"]
    return []


def _widths(card: Card, bits: int) -> list[str]:
    lines = []
    if card.hot and UNKNOWN in card.pointers:
        # one of these could be narrow
        lines.append("global accesses: of some it could not be found out which argument they go through")
    for pointer in card.hot:
        accesses = card.pointers.get(pointer, {})
        narrow = [
            f"{count} {kind} of {width}"
            for kind, widths in accesses.items()
            for width, count in widths.items()
            if width < bits
        ]
        if narrow:
            lines.append(f"{pointer}: {', '.join(narrow)} bits, wanted are {bits}")
        elif not accesses:
            lines.append(f"{pointer}: no global access goes through it")
    return lines
