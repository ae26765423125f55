"""Rows of a data set on the Hugging Face hub, streamed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qtrain.data.records import Record, Records, shorten
from qtrain.data.rows import Source
from qtrain.errors import UserError


def read_hub(name: str) -> Records:
    """The rows of `owner/name` (split `train`) or `owner/name:split`; the line is the row's number from 1.

    Raises:
        UserError: the hub can't be reached, or has no such data set or split.
    """
    repository, _, split = name.partition(":")
    for number, row in enumerate(_stream(repository, split or "train"), start=1):
        yield Record(row, Source(name, number))


def _stream(repository: str, split: str) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset
    from huggingface_hub.errors import HfHubHTTPError

    # The hub's client changed its HTTP library twice; this is that library's own base of all errors.
    transport_error: Any = HfHubHTTPError.__bases__[0]
    try:
        yield from load_dataset(repository, split=split, streaming=True)
    except (ConnectionError, TimeoutError, transport_error) as error:
        raise UserError(
            f"{repository}: no such file here, and the hub can't be reached ({_first_line(error)}); "
            "download the data and name a local file"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        # datasets' own errors for a missing repository, configuration or split derive from these
        raise UserError(f"{repository}: the hub gives no such data set: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return shorten((str(error).strip() or type(error).__name__).splitlines()[0], 120)
