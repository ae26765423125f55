"""Rows of text as token ids: to calibrate on, and some of them kept back to measure on."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from qtrain.data.dataset import TokenDataset, build_dataset, resolve_name
from qtrain.data.load import RowReader
from qtrain.errors import UserError
from qtrain.export.calibration import Calibration, check_windows, pack_windows
from qtrain.model.load import load_tokenizer
from qtrain.runs.atomic import file_sha256

from .rows import Windows, held_out_windows, ids_and_mask, windows_of
from .source import Source

TEXT = ".txt"
KEPT_BACK = 10  # one row of so many is kept from calibration, to measure on
UNCUT = 2**30  # tokens of a row
BLOCK = 2**16  # characters of a text file that are tokenised at once


@dataclass(frozen=True, slots=True)
class RowsSettings:
    """What the command line says of rows.

    Attributes:
        calib: windows to calibrate on, and
        length: their tokens.
        files: to calibrate on; none are the run's own training rows.
        seed: of the rows' order.
        data: files to measure on,
        rows: of which so many, and
        tokens: cut there.
    """

    calib: int
    length: int
    files: list[str]
    seed: int
    data: list[str]
    rows: int
    tokens: int


def calibration_and_held_out(
    source: Source, settings: RowsSettings, config: Any
) -> tuple[Calibration, Windows]:
    """Windows to calibrate on and rows to measure on, apart from each other where there are enough rows.

    Rows to measure on are those of `data`, else the run's held-out rows, else a tenth of the calibration's
    rows that are kept back, else (fewer than ten rows) the calibration windows themselves.

    Args:
        config: transformers' config of the model.

    Raises:
        UserError, ExportError: no rows, bad rows, windows that the model can't take.
    """
    rows = calibration_rows(source, settings)
    held_out = held_out_rows(source, settings)
    kept_back: list[int] = []
    if held_out is None:
        count = min(settings.rows, len(rows) // KEPT_BACK)
        kept_back = sorted(random.Random(f"{settings.seed} kept back").sample(range(len(rows)), count))
    used = _Without(rows, kept_back)
    found = pack_windows(used, settings.length, settings.calib, seed=settings.seed, source=rows.name)
    check_windows(found, config)
    if held_out is None and kept_back:
        kept = [rows.row(index) for index in kept_back]
        held_out = windows_of(kept, settings.tokens, rows.files, held_out=True)
    if held_out is None:
        ids = [window[: settings.tokens] for window in found.windows[: settings.rows].tolist()]
        held_out = Windows(ids, rows.files, held_out=False)
    return found, held_out


def held_out_rows(source: Source, settings: RowsSettings) -> Windows | None:
    """Rows of `data`, or the run's held-out ones; None where there are none and some are to be kept back."""
    if not settings.rows:
        return held_out_windows(source, settings.data, 0, settings.tokens)
    if not settings.data and not source.data.eval:
        return None
    found = text_windows(source, settings)
    found = found or held_out_windows(source, settings.data, settings.rows, settings.tokens)
    if found.ids:
        return found
    source.notes.append(f"no held-out rows ({found.missing}): some calibration rows are kept back instead")
    return None


def text_windows(source: Source, settings: RowsSettings) -> Windows | None:
    """Rows to measure on out of text files; None where `data` holds no text file."""
    if not any(_is_text(name) for name in settings.data) or not settings.rows:
        return None
    ids: list[list[int]] = []
    for name in settings.data:
        if not _is_text(name):
            raise UserError(
                f"--data: {name} can't stand beside a {TEXT} file; give text files alone, or rows"
            )
        ids += text_pieces(name, load_tokenizer(str(source.base), source.model), settings.tokens)
    return Windows(ids[: settings.rows], list(settings.data), held_out=True)


class Rows(Sequence[Sequence[int]]):
    """Token ids of rows, read where they are asked for.

    Attributes:
        name: for messages.
        files: SHA-256 by name (None for a data set on the hub).
    """

    def __init__(self, parts: Sequence[Any], name: str, hashes: dict[str, str | None]) -> None:
        self._parts = parts
        self.name = name
        self.hashes = hashes
        self._places = [(part, row) for part, its in enumerate(parts) for row in range(len(its))]

    @property
    def files(self) -> list[str]:
        """Their names."""
        return list(self.hashes)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Sequence[int]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sequence[int]]: ...
    def __getitem__(self, index: int | slice) -> Sequence[int] | Sequence[Sequence[int]]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return ids_and_mask(self.row(index))[0]

    def row(self, index: int) -> Any:
        """A row with what else is known of it."""
        part, row = self._places[index]
        return self._parts[part][row]


def calibration_rows(source: Source, settings: RowsSettings) -> Rows:
    """The rows of `settings.files`, else the run's training rows.

    Raises:
        UserError: there are none to take, or they can't be read.
    """
    if settings.files:
        names = settings.files
    elif source.run is not None:
        names = source.data.train
    else:
        raise UserError(
            f"{source.name} is no run, so that there are no training rows to calibrate on; "
            "give rows like those it will see: --calib-data FILE"
        )
    tokenizer = load_tokenizer(str(source.base), source.model)
    parts: list[Any] = []
    hashes: dict[str, str | None] = {}
    for name in names:
        if _is_text(name):
            parts.append(text_pieces(name, tokenizer, settings.length))
            hashes[name] = file_sha256(Path(name).expanduser())
        else:
            dataset = _dataset(source, name, tokenizer, own=not settings.files)
            parts.append(dataset)
            hashes[name] = dataset.report.files[0].sha256 or None
    return Rows(parts, ", ".join(names), hashes)


def text_pieces(name: str, tokenizer: Any, length: int) -> list[list[int]]:
    """A text file's tokens, cut into pieces of `length`; the last may be shorter.

    Raises:
        UserError: it is missing, no UTF-8, or empty.
    """
    path = Path(name).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{name}: there is no such file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: is not UTF-8 at byte {error.start}; convert it first") from error
    except OSError as error:
        raise UserError(f"{name}: can't be read: {error.strerror}") from error
    if not text.strip():
        raise UserError(f"{name}: holds no text")
    ids: list[int] = []
    for block in _blocks(text):
        ids += tokenizer(block, add_special_tokens=False, verbose=False)["input_ids"]
    return [ids[first : first + length] for first in range(0, len(ids), length)]


def _blocks(text: str) -> Iterator[str]:
    """Parts that end where a line does, of BLOCK characters or a little more."""
    first = 0
    while first < len(text):
        end = text.find("\n", first + BLOCK)
        end = len(text) if end < 0 else end + 1
        yield text[first:end]
        first = end


def _dataset(source: Source, name: str, tokenizer: Any, *, own: bool) -> TokenDataset:
    settings = source.data
    if source.template is not None:
        settings = settings.model_copy(update={"chat_template": str(source.template)})
    if own:
        try:
            return build_dataset(settings, tokenizer, method=source.method, files=[name])
        except UserError as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"the training rows of {source.name} can't be read ({reason}); give others: --calib-data FILE"
            ) from error
    read = resolve_name(name, source.method)
    preference = RowReader(read, format=settings.format).format.name == "preference"
    settings = settings.model_copy(update={"max_length": UNCUT})  # a long row goes on in the next window
    return build_dataset(settings, tokenizer, method="dpo" if preference else "sft", files=[name])


def _is_text(name: str) -> bool:
    return Path(name).suffix.lower() == TEXT


class _Without(Sequence[Sequence[int]]):
    """Rows but for some."""

    def __init__(self, rows: Sequence[Sequence[int]], gone: Sequence[int]) -> None:
        self._rows = rows
        kept = set(gone)
        self._left = [index for index in range(len(rows)) if index not in kept]

    def __len__(self) -> int:
        return len(self._left)

    @overload
    def __getitem__(self, index: int) -> Sequence[int]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sequence[int]]: ...
    def __getitem__(self, index: int | slice) -> Sequence[int] | Sequence[Sequence[int]]:
        if isinstance(index, slice):
            return [self._rows[place] for place in self._left[index]]
        return self._rows[self._left[index]]
