"""How the page writes numbers: three significant digits, units everywhere, ratios with intervals."""

from __future__ import annotations

import math

from ..results import Figure
from ..statistics import Ratio

DASH = "–"
# unit -> ((from this value on, divided by, written as), ...), the largest first
_SCALES: dict[str, tuple[tuple[float, float, str], ...]] = {
    "s": ((1.0, 1.0, "s"), (1e-3, 1e-3, "ms"), (0.0, 1e-6, "µs")),
    "bytes": (
        (float(1 << 30) * 10, float(1 << 30), "GiB"),
        (float(1 << 20), float(1 << 20), "MiB"),
        (0.0, 1024.0, "KiB"),
    ),
    "share": ((0.0, 0.01, "%"),),
    "FLOP": ((1e12, 1e12, "TFLOP"), (1e9, 1e9, "GFLOP"), (0.0, 1e6, "MFLOP")),
    "FLOP/s": ((1e12, 1e12, "TFLOP/s"), (0.0, 1e9, "GFLOP/s")),
}


def digits(value: float, count: int = 3) -> str:
    """So many significant digits, never an exponent, no thousands cut: 0.0573, 6.32, 31.8, 2180."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    places = max(0, count - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(places, 8)}f}".replace(",", "\u202f")


def tick(value: float) -> str:
    """As short as it can be."""
    return f"{value:,.10g}".replace(",", "\u202f")


def scale(unit: str, largest: float) -> tuple[float, str]:
    """(divisor, written unit) that suits values up to `largest`."""
    for least, divisor, name in _SCALES.get(unit, ()):
        if abs(largest) >= least:
            return divisor, name
    return 1.0, unit


def quantity(value: float | None, unit: str) -> str:
    """`6.32 s`, `273 MiB`."""
    if value is None:
        return DASH
    divisor, name = scale(unit, value)
    return f"{digits(value / divisor)}\u00a0{name}".rstrip("\u00a0")


def median_of(figure: Figure | None) -> str:
    """Its median with the unit."""
    return DASH if figure is None else quantity(figure.p50, figure.unit)


def ratio(found: Ratio | None) -> str:
    """`5.03 [4.15, 5.29]`; a ratio of single values has no interval."""
    if found is None:
        return DASH
    interval = "" if found.low == found.high else f" [{found.low:.2f}, {found.high:.2f}]"
    return f"{found.estimate:.2f}{interval}"


def listed(words: list[str]) -> str:
    """`a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""
