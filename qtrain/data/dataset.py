"""All rows of some files as token ids, in a few flat arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from qtrain.data.bad_rows import bad_rows_file
from qtrain.data.files import is_hub_name, local_file
from qtrain.data.load import ProblemHandler, RowReader
from qtrain.data.report import DatasetReport, FileReport
from qtrain.data.rows import Conversation, Message, PreferencePair, Row
from qtrain.data.template import ChatEncoder, EncodedExample, EncodedPair
from qtrain.data.tokens import TokenDataset, TokenStore
from qtrain.errors import DataError, UserError
from qtrain.recipe.schema import DataSettings
from qtrain.runs.atomic import file_sha256

Method = Literal["sft", "dpo"]
Split = Literal["train", "heldout"]

__all__ = ["TokenDataset", "build_dataset", "resolve_name"]


def build_dataset(
    settings: DataSettings,
    tokenizer: Any,
    *,
    method: Method,
    files: list[str],
    limit: int | None = None,
    bad_rows_path: Path | None = None,
    split: Split = "train",
) -> TokenDataset:
    """Read, check and encode the rows of `files`; the name `demo` is the data that ships with qtrain.

    Args:
        settings: format, template, length and reasoning; `settings.skip_bad_rows` leaves bad rows out.
        tokenizer: of the model to be trained.
        method: `sft` wants conversations, `dpo` preference pairs.
        limit: stop after so many rows.
        split: which of the demo's files the name `demo` means; files have no splits.
        bad_rows_path: where bad rows go with their reasons when they are left out, as jsonl.

    Raises:
        DataError: all bad rows of the first file that has any (unless left out), mixed formats.
        UserError: a missing or empty file, one of the wrong kind for `method`, no usable template.
    """
    encoder = ChatEncoder(
        tokenizer,
        max_length=settings.max_length,
        reasoning=settings.reasoning,
        system=settings.system,
        chat_template=settings.chat_template,
    )
    store = TokenStore(per_row=3 if method == "dpo" else 1)
    reports: list[FileReport] = []
    special = _SpecialTokenNote(encoder)
    with bad_rows_file(bad_rows_path) as keep_bad_row:
        for name in files:
            left = None if limit is None else limit - sum(report.rows for report in reports)
            if left == 0:
                break
            on_problem = keep_bad_row if settings.skip_bad_rows else None
            reader = RowReader(
                resolve_name(name, method, split), format=settings.format, on_problem=on_problem
            )
            _check_method(reader, method)
            reports.append(_encode_file(reader, encoder, store, left, on_problem, special))
    if not store.places:
        raise UserError(f"{', '.join(files)}: every row is bad, nothing is left to train on")
    report = DatasetReport(method, reports, [*encoder.notes, *special.notes()], settings.max_length)
    return TokenDataset(store, report, encoder)


def resolve_name(name: str, method: Method, split: Split = "train") -> str:
    """The path behind `demo`, the data that ships with qtrain; other names as they are."""
    if name != "demo" or Path(name).exists():
        return name
    from qtrain.demo.files import demo_path

    return str(demo_path(method, split))


def _check_method(reader: RowReader, method: Method) -> None:
    is_preference = reader.format.name == "preference"
    if method == "sft" and is_preference:
        raise UserError(
            f"{reader.name}: holds preference pairs ({reader.reason}); train on them with --method dpo, "
            "or name another of its formats as data.format"
        )
    if method == "dpo" and not is_preference:
        raise UserError(
            f"{reader.name}: holds conversations ({reader.reason}); DPO needs 'chosen' and 'rejected'"
        )


def _encode_file(
    reader: RowReader,
    encoder: ChatEncoder,
    store: TokenStore,
    limit: int | None,
    on_problem: ProblemHandler | None,
    special: _SpecialTokenNote,
) -> FileReport:
    report = FileReport(reader.name, reader.format.name, reader.reason)
    problems: list[str] = []
    try:
        for row in reader:
            try:
                for encoded in _encode(row, encoder):
                    store.append(encoded)
                    report.count(encoded)
            except DataError as error:
                if on_problem is None:
                    problems.extend(error.problems)
                else:
                    report.skipped += 1
                    on_problem(error.problems[0], _as_dict(row))
                continue
            report.rows += 1
            special.look(row)
            if report.rows == limit:
                reader.finish()
                break
    except DataError as error:
        if not problems:
            raise
        problems = sorted([*error.problems, *problems], key=_line_of)
    if problems:
        raise DataError(_summary(reader, problems), problems)
    report.skipped += reader.bad
    report.extra_columns = sorted(reader.extra_columns)
    if not is_hub_name(reader.name):
        report.sha256 = file_sha256(local_file(reader.name))
    return report


def _encode(row: Row, encoder: ChatEncoder) -> list[EncodedExample] | list[EncodedPair]:
    if isinstance(row, PreferencePair):
        return [encoder.encode_pair(row)]
    return encoder.encode_all(row)


def _summary(reader: RowReader, problems: list[str]) -> str:
    return f"{reader.name}: {len(problems)} bad row{'s' if len(problems) != 1 else ''} of {reader.records}:"


def _line_of(problem: str) -> int:
    """The line number in `file:line: reason`; the file's name may hold colons, the number is digits."""
    return next((int(piece) for piece in problem.split(":")[1:] if piece.isdigit()), 0)


def _as_dict(row: Row) -> dict[str, Any]:
    def plain(messages: tuple[Message, ...]) -> list[dict[str, str]]:
        keys = ("role", "content", "reasoning")
        return [
            {key: text for key in keys if (text := getattr(message, key)) is not None} for message in messages
        ]

    if isinstance(row, Conversation):
        return {"messages": plain(row.messages), **row.extra}
    sides = {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}
    return {**{name: plain(messages) for name, messages in sides.items()}, **row.extra}


class _SpecialTokenNote:
    """Counts rows whose text holds a special token, which the tokenizer turns into that token."""

    def __init__(self, encoder: ChatEncoder) -> None:
        self._encoder = encoder
        self._count = 0
        self._first = ""

    def look(self, row: Row) -> None:
        turns = row.messages if isinstance(row, Conversation) else (*row.prompt, *row.chosen, *row.rejected)
        token = self._encoder.special_token_in(turns)
        if token is not None:
            self._count += 1
            self._first = self._first or f"'{token}' at {row.source}"

    def notes(self) -> list[str]:
        if not self._count:
            return []
        return [
            f"rows whose text holds a special token of the tokenizer: {self._count}, the first {self._first}"
        ]
