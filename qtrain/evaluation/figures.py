"""How figures are written, in the terminal and on the page alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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


def shortened(text: str, length: int) -> str:
    """One line of at most `length` characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= length else f"{flat[: length - 1]}…"
