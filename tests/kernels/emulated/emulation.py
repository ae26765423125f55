"""Public ops on CPU tensors with their Triton kernels as compiled code, and the same with a fault in it.

def check(edit=None):
    with emulated(edit):
        got = op(...)
    assert_close(got, want)

def test_op(): check()
def test_a_missing_wait_is_noticed(): assert_noticed(check, missing_wait())
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from qtrain.bench.ptx import Counters, EmulationError, patched
from qtrain.kernels import force_backend

ROOT = Path(__file__).resolve().parents[3]
MAX_STEPS = 200_000  # blocks of a batch of programs: a kernel that loses its way ends
Edit = Callable[[str], str]
Check = Callable[[Edit | None], None]


@contextmanager
def emulated(
    edit: Edit | None = None, *, racecheck: bool = True, target: int = 89
) -> Iterator[list[tuple[str, Counters]]]:
    """Ops take their Triton path and their kernels run on the emulator; yields the list of launches.

    `edit` changes the PTX text of every kernel before it runs.
    """
    log: list[tuple[str, Counters]] = []
    with (
        force_backend("triton"),
        patched(target, log, racecheck=racecheck, max_steps=MAX_STEPS, edit=edit),
    ):
        yield log


@dataclass
class Fault:
    """An edit that replaces the PTX lines' parts matching `pattern`, as re.sub does.

    kernel: only in kernels with this in their name. at: only in code made from source lines that hold this
    text. which: only the match of this number, from 0. `changed` counts what was replaced.
    """

    pattern: str
    replacement: str | Callable[[re.Match[str]], str]
    kernel: str = ""
    at: str = ""
    which: int | None = None
    changed: int = field(default=0, init=False)
    elsewhere: set[str] = field(default_factory=set, init=False)  # source lines whose code would match

    def __call__(self, ptx: str) -> str:
        """The text with the fault."""
        name = re.search(r"\.entry\s+(\w+)", ptx)
        if name is None or self.kernel not in name.group(1):
            return ptx
        lines, matches, source = ptx.split("\n"), 0, ""
        for number, line in enumerate(lines):
            place = re.match(r"\s*\.loc\s.*//\s*(\S+?):(\d+):", line)
            if place:
                source = _source(place.group(1), int(place.group(2)))
            elif re.search(self.pattern, line):
                if self.at not in source:
                    self.elsewhere.add(source.strip())
                    continue
                if self.which in (None, matches):
                    lines[number] = re.sub(self.pattern, self.replacement, line)
                    self.changed += 1
                matches += 1
        return "\n".join(lines)


@lru_cache
def _lines(file: str) -> list[str]:
    """Of the file of this name, which is all that .loc says."""
    found = [*ROOT.glob(f"kernels/{file}"), *ROOT.glob(f"tests/**/{file}")]
    return found[0].read_text().splitlines() if found else []


def _source(file: str, line: int) -> str:
    lines = _lines(file)
    return lines[line - 1] if 0 < line <= len(lines) else ""


def assert_noticed(check: Check, fault: Fault) -> str:
    """`check` must fail with the fault, by an assertion or by the emulator; returns the message.

    That it passes without is for a test of its own to show.
    """
    try:
        check(fault)
    except (AssertionError, EmulationError) as error:
        message = str(error)
    else:
        message = ""
    places = "".join(f"\n  {line}" for line in sorted(fault.elsewhere))
    assert fault.changed, (
        f"there is no {fault.pattern!r} to replace at {fault.at!r}, but at{places or ' no line'}"
    )
    assert message, f"{fault.changed} replaced {fault.pattern!r} went unnoticed"
    return message


def missing_wait(**where: str | int) -> Fault:
    """No cp.async.wait_group."""
    return _fault(r"cp\.async\.wait_group\s+\d+;", "", where)


def early_wait(groups: int = 1, **where: str | int) -> Fault:
    """Waits that leave so many more groups in flight."""

    def later(match: re.Match[str]) -> str:
        return f"cp.async.wait_group {int(match[1]) + groups};"

    return _fault(r"cp\.async\.wait_group\s+(\d+);", later, where)


def missing_barrier(**where: str | int) -> Fault:
    """No bar.sync; noticed by the racecheck alone."""
    return _fault(r"bar\.sync\s+0;", "", where)


def off_by_one(**where: str | int) -> Fault:
    """< where <= should be, and so on."""
    swapped = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt"}

    def other(match: re.Match[str]) -> str:
        return f"setp.{swapped[match[1]]}"

    return _fault(r"setp\.(lt|le|gt|ge)\b", other, where)


def no_rescaling(**where: str | int) -> Fault:
    """Every exponential is 1."""
    return _fault(r"ex2\.approx(?:\.ftz)?\.f32\s+(\S+),\s*\S+;", r"mov.b32 \1, 0f3F800000;", where)


def _fault(
    pattern: str, replacement: str | Callable[[re.Match[str]], str], where: dict[str, str | int]
) -> Fault:
    fault = Fault(pattern, replacement)
    for name, value in where.items():
        if name not in ("kernel", "at", "which"):
            raise TypeError(f"a fault is placed by kernel, at and which, not by {name!r}")
        setattr(fault, name, value)
    return fault
