"""Whether weight files hold the tensors of the model that their config.json describes, and numbers in them.

transformers fills what is missing with random numbers and a warning; a checkpoint made of such a folder would
look whole.
"""

from __future__ import annotations

import re
from typing import Any

from .checkpoint import HEAD, Checkpoint
from .errors import ExportError
from .tensors import shape_text

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def expected_tensors(checkpoint: Checkpoint, model: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that the model reads; a head that is tied to the embedding is none."""
    expected = {name: tuple(its.shape) for name, its in model.state_dict().items()}
    if checkpoint.ties_embeddings:
        expected.pop(HEAD, None)
    return expected


def check_complete(checkpoint: Checkpoint, model: Any, *, renamed: bool = False) -> str | None:
    """Hold the files' tensors against the model's; returns a note on tensors that the model has not.

    Args:
        model: its module tree, parameters on `meta`.
        renamed: the files may have other names and shapes than the module tree (transformers converts some
            architectures' while it loads them). Where there are names that are not the model's, only a
            tensor that other layers have is missing then, and shapes are not compared.

    Raises:
        ExportError: a tensor is missing, or has another shape.
    """
    expected = expected_tensors(checkpoint, model)
    others = [name for name in checkpoint.specs if name not in expected and name != HEAD]
    missing = [name for name in expected if name not in checkpoint.specs]
    unclear = missing if renamed and others else []
    if not unclear:
        _check_shapes(checkpoint, expected)
    else:
        in_some_layer = {_NUMBER.sub("*", name) for name in checkpoint.specs}
        missing = [name for name in missing if _NUMBER.sub("*", name) in in_some_layer]
    if missing:
        raise ExportError(
            f"{checkpoint.folder} holds no {first_of(missing)}, which the model of its config.json has; "
            "get the model again"
        )
    if not others:
        return None
    if unclear:
        return (
            f"transformers' model has other names than {checkpoint.folder}: whether {first_of(unclear)} is "
            f"missing, or is {first_of(others)}, is not known"
        )
    return (
        f"{checkpoint.folder} holds {first_of(others)}, which the model of its config.json has not; "
        "carried along as stored"
    )


def _check_shapes(checkpoint: Checkpoint, expected: dict[str, tuple[int, ...]]) -> None:
    for name, shape in expected.items():
        spec = checkpoint.specs.get(name)
        if spec is not None and spec.shape != shape:
            raise ExportError(
                f"{checkpoint.folder / checkpoint.file_of[name]}: {name} is {shape_text(spec.shape)}, and "
                f"{shape_text(shape)} by config.json; get the model again"
            )


def check_numbers(checkpoint: Checkpoint) -> None:
    """Look for NaN and infinities in every tensor, one at a time.

    Raises:
        ExportError: names the tensor.
    """
    for name in checkpoint.specs:
        checkpoint.check_finite(name)


def first_of(names: list[str]) -> str:
    """The first name, and how many more there are, for messages."""
    return f"{names[0]} (and {len(names) - 1} more)" if len(names) > 1 else names[0]
