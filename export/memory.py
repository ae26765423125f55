"""Memory that malloc keeps after it was freed."""

from __future__ import annotations

import ctypes
import sys


def release_free_memory() -> None:
    """Give freed heap back to the system (glibc): activations of changing sizes leave holes that add up."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
