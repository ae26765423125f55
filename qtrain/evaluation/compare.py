"""The comparison of runs and base models on the same held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from .evaluate import EvalSettings, describe, measure, speaker
from .heldout import collect
from .subject import Subject, find_subjects
from .summary import disagreements


def compare_subjects(
    names: Sequence[str], data: Sequence[str], settings: EvalSettings, console: Console
) -> dict[str, Any]:
    """Measure all on the union of the runs' held-out rows; the first is what the others are held against.

    Conversations give the exact checks and the loss (where there are only pairs: their prompts and
    chosen answers), pairs the preferences.

    Raises:
        UserError: no such subject, no held-out rows, bad rows.
    """
    subjects = find_subjects(names)
    rows = collect(subjects, data, settings.limit)
    notes = _unlike(subjects)
    for note in notes:
        speaker(console)(note)
    measured = measure(subjects, rows, settings, console)
    return describe(measured, rows, settings) | {"disagreements": disagreements(measured), "notes": notes}


def _unlike(subjects: Sequence[Subject]) -> list[str]:
    """What differs between the subjects besides their training, and what a base model was given."""
    notes = []
    runs = [subject for subject in subjects if subject.run is not None]
    bases = [subject for subject in subjects if subject.run is None]
    exports = [subject for subject in bases if subject.export is not None]
    bases = [subject for subject in bases if subject.export is None]
    if bases and runs:
        names = ", ".join(subject.name for subject in bases)
        notes.append(
            f"{names}: with the weights ({bases[0].weights}) and the prompts of the runs, like with like"
        )
    if exports and runs:
        names = ", ".join(subject.name for subject in exports)
        notes.append(f"{names}: with their own weights and the prompts of the runs")
    for key in ("system", "reasoning", "chat_template", "max_length"):
        values = {getattr(subject.data, key) for subject in subjects}
        if len(values) > 1:
            each = ", ".join(f"{subject.name} {getattr(subject.data, key)!r}" for subject in subjects)
            notes.append(f"data.{key} differs, each is measured as it was trained: {each}")
    if len({subject.weights for subject in subjects}) > 1:
        each = ", ".join(f"{subject.name} {subject.weights}" for subject in subjects)
        notes.append(f"the weights are held differently: {each}")
    return notes
