"""What a card could do at best: the rates of data sheets, and the time that a case would take at them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rates:
    """Dense products with float32 accumulation, and memory; operations and bytes a second."""

    card: str
    half: float  # bf16 and fp16
    single: float  # fp32 without TF32
    memory: float


# NVIDIA's data sheets. A fragment of the name that the driver gives -> rates; the first that fits counts.
_CARDS = (
    ("RTX 4090", Rates("RTX 4090", 165.2e12, 82.6e12, 1008e9)),
    ("H100 PCIe", Rates("H100 PCIe", 756e12, 51e12, 2000e9)),
    ("H100 NVL", Rates("H100 NVL", 835e12, 60e12, 3900e9)),
    ("H100", Rates("H100 SXM", 989.4e12, 66.9e12, 3350e9)),
    ("H200", Rates("H200 SXM", 989.4e12, 66.9e12, 4800e9)),
)


def rates_of(device_name: str) -> Rates | None:
    """None for a card that is not in the table, and for a CPU."""
    return next((rates for fragment, rates in _CARDS if fragment in device_name), None)


def roofline_seconds(rates: Rates, dtype: str, flops: float, moved: float) -> float:
    """The longer of the arithmetic and the traffic, each at its full rate."""
    return max(flops / (rates.single if dtype == "fp32" else rates.half), moved / rates.memory)
