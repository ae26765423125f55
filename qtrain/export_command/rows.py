"""Held-out rows as token windows, and where their template ends an answer."""

from __future__ import annotations

from dataclasses import dataclass
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
    """

    ids: list[list[int]]
    files: list[str]
    held_out: bool
    missing: str | None = None

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
    ids = [
        [*row.prompt_ids, *row.chosen_ids] if isinstance(row, EncodedPair) else row.input_ids
        for row in dataset
    ]
    return Windows([row[:tokens] for row in ids], chosen, held_out)


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
