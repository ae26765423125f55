"""Whether a served model would stop where the chat template ends a turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def check_stop(folder: Path, stop_token: str, stop_id: int) -> dict[str, Any]:
    """Compare the stop ids that a server reads from a folder with the token that ends an answer.

    Servers take generation_config.json's eos_token_id, and config.json's where there is none. `note` says
    what is wrong, or is None.
    """
    ids, source = _stop_ids(folder)
    note = None
    if stop_id not in ids:
        has = f"stops at {', '.join(map(str, ids))}" if ids else "names no stop token"
        note = (
            f"the chat template ends an answer with {stop_token} ({stop_id}), and {source} {has}: "
            f"served answers would not stop; put {stop_id} into its eos_token_id"
        )
    return {
        "turn_end": stop_token,
        "turn_end_id": stop_id,
        "eos_token_id": ids,
        "read_from": source,
        "note": note,
    }


def _stop_ids(folder: Path) -> tuple[list[int], str]:
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        if found is not None:
            return (found if isinstance(found, list) else [found]), name
    return [], "generation_config.json"
