"""What is known of a data set once it is encoded: counts, lengths, choices made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from qtrain.data.template import EncodedExample, EncodedPair


@dataclass(slots=True)
class FileReport:
    """One file's share."""

    name: str
    format: str
    reason: str  # why the file has this format
    rows: int = 0
    examples: int = 0  # more than rows where a template gives several examples of one conversation
    skipped: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    cut_rows: int = 0
    cut_tokens: int = 0
    extra_columns: list[str] = field(default_factory=list)
    sha256: str | None = None  # None for a hub data set
    lengths: Counter[int] = field(default_factory=Counter)  # tokens of an example -> how many have so many

    def count(self, encoded: EncodedExample | EncodedPair) -> None:
        """Add one example or pair."""
        if isinstance(encoded, EncodedPair):
            supervised = len(encoded.chosen_ids) + len(encoded.rejected_ids)
            length = len(encoded.prompt_ids) + max(len(encoded.chosen_ids), len(encoded.rejected_ids))
            tokens = len(encoded.prompt_ids) + supervised
        else:
            supervised = sum(encoded.supervised)
            length = tokens = len(encoded.input_ids)
        self.examples += 1
        self.tokens += tokens
        self.supervised_tokens += supervised
        self.lengths[length] += 1
        if encoded.cut:
            self.cut_rows += 1
            self.cut_tokens += encoded.cut


@dataclass(slots=True)
class DatasetReport:
    """The files together. Lengths are of an example, for a pair of the prompt and its longer completion."""

    method: str
    files: list[FileReport]
    notes: list[str]
    max_length: int

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)

    @property
    def examples(self) -> int:
        return sum(file.examples for file in self.files)

    @property
    def tokens(self) -> int:
        return sum(file.tokens for file in self.files)

    @property
    def supervised_tokens(self) -> int:
        return sum(file.supervised_tokens for file in self.files)

    @property
    def cut_rows(self) -> int:
        return sum(file.cut_rows for file in self.files)

    @property
    def skipped_rows(self) -> int:
        return sum(file.skipped for file in self.files)

    def length(self, share: float) -> int:
        """The smallest length that a `share` (0 to 1) of the examples does not exceed."""
        return percentile(sum((file.lengths for file in self.files), Counter[int]()), share)

    def lines(self) -> list[str]:
        """The report as short lines of text."""
        unit = "pairs" if self.method == "dpo" else "rows"
        result = []
        for file in self.files:
            skipped = f", {file.skipped} bad ones left out" if file.skipped else ""
            result.append(f"{file.name}: {file.rows:,} {unit}{skipped} ({file.reason})")
            if file.extra_columns:
                result.append(f"  other columns, not trained on: {_listed(file.extra_columns)}")
        share = self.supervised_tokens / max(self.tokens, 1)
        result.append(f"tokens: {self.tokens:,}, of which learnt: {self.supervised_tokens:,} ({share:.0%})")
        median, most, longest = (self.length(share) for share in (0.5, 0.95, 1.0))
        result.append(f"length: median {median:,}, 95 % up to {most:,}, longest {longest:,}")
        if self.examples != self.rows:
            result.append(
                f"examples: {self.examples:,} (answers change once they are history: one for each answer)"
            )
        cut_tokens = sum(file.cut_tokens for file in self.files)
        cut = f"{self.cut_rows:,} ({cut_tokens:,} tokens)" if self.cut_rows else "none"
        result.append(f"cut at data.max_length {self.max_length:,}: {cut}")
        return [*result, *(f"note: {note}" for note in self.notes)]

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values, for a manifest."""
        files = [
            {key: value for key, value in asdict(file).items() if key != "lengths"} for file in self.files
        ]
        return {
            "method": self.method,
            "rows": self.rows,
            "examples": self.examples,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "length_p50": self.length(0.5),
            "length_p95": self.length(0.95),
            "length_max": self.length(1.0),
            "max_length": self.max_length,
            "cut_rows": self.cut_rows,
            "skipped_rows": self.skipped_rows,
            "files": files,
            "notes": self.notes,
        }


def percentile(lengths: Counter[int], share: float) -> int:
    """The smallest length that `share` of the counted ones do not exceed; 0 where none is counted."""
    wanted = share * sum(lengths.values())
    seen = 0
    for length in sorted(lengths):
        seen += lengths[length]
        if seen >= wanted:
            return length
    return 0


def _listed(names: Iterable[str], shown: int = 8) -> str:
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
