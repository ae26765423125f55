"""Everything that can be said about a data file before training on it, in one pass."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b

from qtrain.data.load import MixedFormats, RowReader
from qtrain.data.mixed_outputs import MixedOutputs
from qtrain.data.records import Raw
from qtrain.data.report import percentile
from qtrain.data.rows import Conversation, Message, PreferencePair, Row, Source
from qtrain.data.template import ChatEncoder, CutOff
from qtrain.errors import DataError

_EMPTY = re.compile(r"\bis (empty|blank|an empty list)\b")

# kind of finding -> what the summary calls it; those of NOTED leave the exit code 0.
WRONG = {
    "unreadable": "files that can't be read to their end",
    "mixed formats": "files that mix formats",
    "bad row": "bad rows",
    "empty field": "bad rows with an empty field",
    "duplicate": "rows that repeat an earlier one",
    "completion cut off": "rows whose completion max_length cuts off altogether",
    "cut": "rows that max_length cuts",
    "mixed outputs": "instructions answered with JSON and with free text",
}
NOTED = {
    "same prompt": "rows whose prompt has another answer elsewhere",
    "mixed outputs by system": "system messages under which answers are JSON and free text",
    "ends unanswered": "conversations whose last turn is not the assistant's (that turn is ignored)",
    "special token": "rows whose text holds a special token of the tokenizer",
    "may be cut": "rows longer in bytes than max_length, so that they might be cut",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found; `str()` gives `file:line: reason`."""

    kind: str
    text: str

    @property
    def wrong(self) -> bool:
        return self.kind in WRONG

    def __str__(self) -> str:
        return self.text


@dataclass(slots=True)
class FileCheck:
    """What one file holds."""

    name: str
    format: str = ""
    reason: str = ""
    records: int = 0
    good: int = 0
    found: Counter[str] = field(default_factory=Counter)  # kind of finding -> how many
    extra_columns: list[str] = field(default_factory=list)
    lengths: Counter[int] = field(default_factory=Counter)  # tokens -> rows

    def length(self, share: float) -> int:
        """The smallest length in tokens that `share` of the rows do not exceed; 0 if none was counted."""
        return percentile(self.lengths, share)


class DataCheck:
    """Checks files one after the other; duplicates are found across them.

    Args:
        max_length: tokens that a row may have.
        encoder: counts tokens; None leaves lengths at a bound by bytes (no token is shorter than one).
        report: called with each finding as it is made.
    """

    def __init__(
        self, max_length: int, encoder: ChatEncoder | None, report: Callable[[Finding], None]
    ) -> None:
        self._max_length = max_length
        self._encoder = encoder
        self._report = report
        self._seen_rows = _Places()
        self._seen_prompts = _Places()

    def check(self, name: str, *, format: str = "auto") -> FileCheck:
        """Read `name` to its end and report what is found.

        Raises:
            UserError: there is no such file, or its kind is unknown.
        """
        result = FileCheck(name)
        outputs = MixedOutputs()

        def say(kind: str, text: str) -> None:
            result.found[kind] += 1
            self._report(Finding(kind, text))

        def bad(problem: str, _: Raw) -> None:
            reason = problem.removeprefix(name)
            say("empty field" if _EMPTY.search(reason) else "bad row", problem)

        reader: RowReader | None = None
        try:
            reader = RowReader(name, format=format, on_problem=bad)
            for row in reader:
                result.good += 1
                self._row(row, outputs, result, say)
        except MixedFormats as error:
            say("mixed formats", "\n".join((str(error).partition("\n")[0], *error.problems)))
        except DataError as error:
            for problem in error.problems if result.found.total() == 0 else ():
                say("bad row", problem)
            say("unreadable", str(error).partition("\n")[0].rstrip(":"))
        if reader is not None:
            result.format, result.reason, result.records = reader.format.name, reader.reason, reader.records
            result.extra_columns = sorted(reader.extra_columns)
        for mixed in outputs.found(is_system=False):
            say("mixed outputs", f"{mixed.place}: {mixed}")
        for mixed in outputs.found(is_system=True):
            say("mixed outputs by system", f"{mixed.place}: {mixed}")
        return result

    def _row(
        self, row: Row, outputs: MixedOutputs, result: FileCheck, say: Callable[[str, str], None]
    ) -> None:
        prompt, answers = split_row(row)
        if isinstance(row, Conversation) and row.messages[-1].role != "assistant":
            say("ends unanswered", f"{row.source}: the last turn is the {row.messages[-1].role}'s")
        self._repeats(prompt, answers, row.source, say)
        outputs.add(prompt, answers[0].content, row.source)
        if self._encoder is None:
            texts = (
                text for message in (*prompt, *answers) for text in (message.content, message.reasoning or "")
            )
            size = sum(len(text.encode()) for text in texts)
            if size > self._max_length:
                say("may be cut", f"{row.source}: {size} bytes")
        else:
            self._tokens(row, self._encoder, result, say)

    def _repeats(
        self,
        prompt: tuple[Message, ...],
        answers: tuple[Message, ...],
        source: Source,
        say: Callable[[str, str], None],
    ) -> None:
        earlier = self._seen_rows.find_or_add((*prompt, *answers), source)
        other_answer = self._seen_prompts.find_or_add(prompt, source)
        if earlier is not None:
            say("duplicate", f"{source}: the same row as {earlier}")
        elif other_answer is not None:
            say("same prompt", f"{source}: the same prompt as {other_answer}, with another answer")

    def _tokens(
        self, row: Row, encoder: ChatEncoder, result: FileCheck, say: Callable[[str, str], None]
    ) -> None:
        turns = row.messages if isinstance(row, Conversation) else (*row.prompt, *row.chosen, *row.rejected)
        if (token := encoder.special_token_in(turns)) is not None:
            say("special token", f"{row.source}: holds the text of the special token '{token}'")
        try:
            for length, cut in _measured(encoder, row):
                result.lengths[length] += 1
                if cut:
                    say(
                        "cut", f"{row.source}: {length} tokens, {cut} more than max_length {self._max_length}"
                    )
        except CutOff as error:
            say("completion cut off", error.problems[0])
        except DataError as error:
            say("bad row", error.problems[0])


class _Places:
    """Remembers where a piece of text stood first, at some 150 bytes for each."""

    def __init__(self) -> None:
        self._files: list[str] = []
        self._first: dict[int, int] = {}

    def find_or_add(self, messages: tuple[Message, ...], source: Source) -> Source | None:
        """Where `messages` stood before; None the first time."""
        if not self._files or self._files[-1] != source.file:
            self._files.append(source.file)
        digest = blake2b(digest_size=7)
        for message in messages:
            for text in (message.role, message.content, message.reasoning or ""):
                digest.update(b"%d:" % len(text))
                digest.update(text.encode())
        key = int.from_bytes(digest.digest(), "little")
        if (packed := self._first.get(key)) is None:
            self._first[key] = (len(self._files) - 1) << 40 | source.line
            return None
        return Source(self._files[packed >> 40], packed & ((1 << 40) - 1))


def split_row(row: Row) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """(prompt, answers): what stands before the last answer, and it; or a pair's prompt and both."""
    if isinstance(row, PreferencePair):
        return row.prompt, (*row.chosen, *row.rejected)
    last = max(index for index, message in enumerate(row.messages) if message.role == "assistant")
    return row.messages[:last], (row.messages[last],)


def _measured(encoder: ChatEncoder, row: Row) -> list[tuple[int, int]]:
    """(tokens, how many of them max_length cuts) for each example of a row."""
    if isinstance(row, PreferencePair):
        pair = encoder.encode_pair(row)
        return [
            (len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) + pair.cut, pair.cut)
        ]
    return [(len(example.input_ids) + example.cut, example.cut) for example in encoder.encode_all(row)]
