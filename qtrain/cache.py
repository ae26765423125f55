"""Where qtrain keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$QTRAIN_CACHE, else $XDG_CACHE_HOME/qtrain, else ~/.cache/qtrain."""
    if own := os.environ.get("QTRAIN_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qtrain"
