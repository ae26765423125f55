"""Where the demo's data lies in the package."""

from __future__ import annotations

from pathlib import Path

from qtrain.errors import UserError

METHODS = ("sft", "dpo")
SPLITS = ("train", "heldout")


def demo_path(method: str, split: str, language: str = "en") -> Path:
    """The file of a method ("sft", "dpo"), a split ("train", "heldout") and a language ("en", "zh").

    Raises:
        UserError: there is no such file.
    """
    for name, value, known in (
        ("method", method, METHODS),
        ("split", split, SPLITS),
        ("language", language, ("en", "zh")),
    ):
        if value not in known:
            raise UserError(f"demo data: {name} is {value!r}; it is one of {', '.join(known)}")
    return Path(__file__).parent / f"{method}-{split}-{language}.jsonl"
