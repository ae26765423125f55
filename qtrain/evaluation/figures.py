"""How figures are written, in the terminal and on the page alike."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any

_UNSEEN = ("Cc", "Cf", "Zl", "Zp")


def value_text(value: float, unit: str) -> str:
    """0.8333 -> '83.3%' for shares; nats with three digits."""
    return f"{value:.1%}" if unit == "share" else f"{value:.3f}"


def interval_text(interval: Mapping[str, Any], unit: str) -> str:
    """'[72.9, 91.7]'; shares in percent, without the sign."""
    scale, digits = (100, 1) if unit == "share" else (1, 3)
    return f"[{interval['low'] * scale:.{digits}f}, {interval['high'] * scale:.{digits}f}]"


def difference_text(interval: Mapping[str, Any], unit: str) -> str:
    """'+79.2 [+66.7, +89.6]'; shares in percentage points."""
    scale, digits = (100, 1) if unit == "share" else (1, 3)
    mean, low, high = (interval[key] * scale for key in ("mean", "low", "high"))
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def printable(text: str) -> str:
    """Text that moves no cursor and turns no writing around: control and format characters become `·`."""
    return "".join(
        "    " if char == "\t" else "·" if unicodedata.category(char) in _UNSEEN and char != "\n" else char
        for char in text
    )


def shortened(text: str, length: int) -> str:
    """One line of at most `length` characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= length else f"{flat[: length - 1]}…"


def short_source(source: str) -> str:
    """'/far/away/rows.jsonl:7' -> 'rows.jsonl:7'."""
    return source.replace("\\", "/").rpartition("/")[2]
