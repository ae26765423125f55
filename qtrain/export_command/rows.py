"""Held-out rows as token windows, and where their template ends an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qtrain.data.dataset import build_dataset
from qtrain.data.template import ChatEncoder, EncodedPair
from qtrain.errors import UserError
from qtrain.export.stops import check_stop
from qtrain.model.load import load_tokenizer

from .source import Source


@dataclass(frozen=True, slots=True)
class Windows:
    """Token ids to measure on.

    Attributes:
        ids: a row each; none where `missing` says why.
        files: they come from.
        held_out: whether they were kept from training.
        missing: why there are none.
        learnt: of each token, whether it is part of an answer; empty for text that has no answers.
    """

    ids: list[list[int]]
    files: list[str]
    held_out: bool
    missing: str | None = None
    learnt: list[list[bool]] = field(default_factory=list)

    def ends(self, stop_id: int) -> list[list[int]]:
        """Of each window, the places behind which an answer ends with a token."""
        return [
            [
                place
                for place, (token, learnt) in enumerate(zip(window[1:], mask[1:], strict=False))
                if learnt and token == stop_id
            ]
            for window, mask in zip(self.ids, self.learnt, strict=False)
        ]

    def as_dict(self) -> dict[str, Any]:
        """For a manifest: the ids are counted."""
        return {
            "files": self.files,
            "held_out": self.held_out,
            "rows": len(self.ids),
            "tokens": sum(map(len, self.ids)),
            "missing": self.missing,
        }


def held_out_windows(source: Source, files: list[str], rows: int, tokens: int) -> Windows:
    """The first `rows` rows of `files`, else of the run's held-out rows, else of its training rows.

    Each is cut after `tokens` tokens. Rows that can't be had are no error unless they were asked for: an
    export is not to fail because data has moved.

    Raises:
        UserError: `files` can't be read.
    """
    if not rows:
        return Windows([], [], False, "not asked for (--rows 0)")
    chosen = files or source.data.eval or (source.data.train if source.run is not None else [])
    held_out = bool(files or source.data.eval)
    if not chosen:
        return Windows([], [], False, f"{source.name} is no run and has no rows; name a file with --data")
    settings = source.data
    if source.template is not None:
        settings = settings.model_copy(update={"chat_template": str(source.template)})
    try:
        dataset = build_dataset(
            settings,
            load_tokenizer(str(source.base), source.model),
            method=source.method,
            files=chosen,
            limit=rows,
            split="heldout" if held_out else "train",
        )
    except UserError as error:
        if files:
            raise
        return Windows([], chosen, held_out, str(error).splitlines()[0])
    return windows_of(list(dataset), tokens, chosen, held_out)


def windows_of(rows: Sequence[Any], tokens: int, files: list[str], held_out: bool) -> Windows:
    """Rows (EncodedExample, EncodedPair, or plain ids) cut after `tokens` tokens; of a pair, the chosen."""
    ids, learnt = zip(*map(ids_and_mask, rows), strict=True) if rows else ((), ())
    return Windows(
        [list(row[:tokens]) for row in ids],
        files,
        held_out,
        learnt=[list(mask[:tokens]) for mask in learnt],
    )


def ids_and_mask(row: Any) -> tuple[Sequence[int], Sequence[bool]]:
    """A row's tokens, and which of them are learnt; of a pair, the chosen answer's."""
    if isinstance(row, EncodedPair):
        mask = [False] * len(row.prompt_ids) + [True] * len(row.chosen_ids)
        return [*row.prompt_ids, *row.chosen_ids], mask
    return (row, [False] * len(row)) if isinstance(row, list) else (row.input_ids, row.supervised)


def stop_check(source: Source, folder: Path) -> dict[str, Any]:
    """Whether a server that reads `folder` stops where the run's chat template ends an answer."""
    try:
        encoder = ChatEncoder(
            tokenizer := load_tokenizer(str(source.base), source.model),
            max_length=source.data.max_length,
            system=source.data.system,
            chat_template=str(source.template) if source.template is not None else source.data.chat_template,
        )
    except UserError as error:
        return {"note": f"the end of an answer was not checked: {error}"}
    return check_stop(folder, encoder.stop_token, tokenizer.convert_tokens_to_ids(encoder.stop_token))


def ends_of(windows: Windows, stops: dict[str, Any]) -> tuple[int, list[list[int]]] | None:
    """The token that ends an answer (of `stop_check`), and where one ends in each window."""
    stop_id = stops.get("turn_end_id")
    return None if stop_id is None else (stop_id, windows.ends(stop_id))
