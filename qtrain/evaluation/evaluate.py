"""Measuring subjects on held-out rows, and the evaluation of one of them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qtrain.data.rows import Conversation
from qtrain.model.load import Base
from qtrain.runs.atomic import disk_errors, write_json
from qtrain.runs.manifest import adapter_hash, provenance

from .heldout import HeldOut, collect, leaked
from .score import make_encoder, score_answers, score_pairs
from .subject import Say, Subject, adapted, find_subject, open_base
from .summary import Measured, score_of, sections

ANSWER_SLACK = 1.25  # an answer this much longer than the longest reference can't be equal to its own
MIN_NEW_TOKENS = 64


@dataclass(frozen=True, slots=True)
class EvalSettings:
    """How to evaluate. `max_new_tokens` None: `ANSWER_SLACK` times the longest reference."""

    limit: int | None = None
    max_new_tokens: int | None = None
    batch_size: int = 64


def speaker(console: Console) -> Say:
    """Plain lines on a console, never wrapped."""

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    return say


def evaluate_one(name: str, data: Sequence[str], settings: EvalSettings, console: Console) -> dict[str, Any]:
    """Evaluate a run or base model; a run's result on its own held-out rows is kept in RUN/eval.json.

    Raises:
        UserError: no such subject, no held-out rows, bad rows.
    """
    say = speaker(console)
    subject = find_subject(name)
    rows = collect([subject], data, settings.limit)
    measured = measure([subject], rows, settings, console)[0]
    result = describe([measured], rows, settings) | {"score": score_of(measured)}
    if subject.run is not None:
        path = subject.run.path / "eval.json"
        if settings.limit is None and (not data or not subject.data.eval):
            with disk_errors("the evaluation", path):
                write_json(path, result)
            say(f"kept in {path}")
        else:
            say(f"not kept in {path}: these are not all of the run's own held-out rows")
    return result


def measure(
    subjects: Sequence[Subject], rows: HeldOut, settings: EvalSettings, console: Console
) -> list[Measured]:
    """Everything of every subject, in their order; each base is loaded once for all that share it."""
    say = speaker(console)
    say(_held_out_line(rows))
    questions = rows.conversations or [
        Conversation((*pair.prompt, *pair.chosen), pair.source, pair.extra) for pair in rows.pairs
    ]
    found: dict[int, Measured] = {}
    for group in _by_base(subjects):
        names = ", ".join(subjects[number].name for number in group)
        say(f"loading {subjects[group[0]].model.name} ({subjects[group[0]].weights}) for {names}")
        base = open_base(subjects[group[0]], say)
        for number in group:
            found[number] = _measure_one(base, subjects[number], questions, rows, settings, console)
        del base
    return [found[number] for number in range(len(subjects))]


def describe(measured: Sequence[Measured], rows: HeldOut, settings: EvalSettings) -> dict[str, Any]:
    """The result as JSON: subjects with their rows, figures, held-out rows, settings, provenance."""
    return {
        "subjects": [asdict(subject) for subject in measured],
        "sections": [asdict(section) for section in sections(measured)],
        "held_out": {
            "files": rows.files,
            "sha256": rows.sha256,
            "conversations": len(rows.conversations),
            "pairs": len(rows.pairs),
            "duplicates": rows.duplicates,
        },
        "settings": asdict(settings) | {"decoding": "greedy"},
        **provenance(),
    }


def _measure_one(
    base: Base,
    subject: Subject,
    questions: Sequence[Conversation],
    rows: HeldOut,
    settings: EvalSettings,
    console: Console,
) -> Measured:
    encoder = make_encoder(base, subject.data)
    longest = max(sum(example.supervised) for row in questions for example in encoder.encode_all(row))
    limit = settings.max_new_tokens or max(MIN_NEW_TOKENS, math.ceil(ANSWER_SLACK * longest))
    with adapted(base, subject) as model, _progress(console) as progress:
        task = progress.add_task(
            f"{subject.name}: answers, references", total=2 * len(questions) + len(rows.pairs)
        )

        def advance(count: int) -> None:
            progress.advance(task, count)

        scores = score_answers(
            model,
            base,
            encoder,
            questions,
            max_new_tokens=limit,
            batch_size=settings.batch_size,
            advance=advance,
        )
        pairs = score_pairs(model, base, encoder, rows.pairs, advance)
    notes = _notes(subject, rows)
    for note in notes:
        speaker(console)(f"{subject.name}: {note}")
    return Measured(
        name=subject.name,
        base=subject.model.name,
        weights=subject.weights,
        adapter=None if subject.run is None else adapter_hash(subject.run.adapter),
        rows=scores,
        pairs=pairs,
        tokenizer=_vocabulary(base),
        max_new_tokens=limit,
        notes=notes,
    )


def _notes(subject: Subject, rows: HeldOut) -> list[str]:
    count, unknown = leaked(subject, rows)
    notes = []
    if count:
        notes.append(f"warning: the prompts of {count} held-out rows are also in its training rows")
    if unknown is not None:
        notes.append(f"whether held-out rows are in its training rows was not looked at: {unknown}")
    return notes


def _by_base(subjects: Sequence[Subject]) -> list[list[int]]:
    groups: dict[str, list[int]] = {}
    for number, subject in enumerate(subjects):
        groups.setdefault(subject.model.model_dump_json(), []).append(number)
    return list(groups.values())


def _vocabulary(base: Base) -> str:
    return hashlib.sha256(json.dumps(sorted(base.tokenizer.get_vocab().items())).encode()).hexdigest()


def _held_out_line(rows: HeldOut) -> str:
    kinds = [f"{len(rows.conversations)} conversations"] if rows.conversations else []
    kinds += [f"{len(rows.pairs)} preference pairs"] if rows.pairs else []
    twice = f" ({rows.duplicates} repetitions left out)" if rows.duplicates else ""
    return f"held-out: {', '.join(kinds)} from {', '.join(rows.files)}{twice}"


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
