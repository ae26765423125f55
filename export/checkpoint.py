"""A model folder read tensor by tensor: safetensors only, never the whole model in memory."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .disk import sha256
from .errors import ExportError
from .tensors import TensorSpec, check_finite, read_specs

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a model folder by name, and which file each lies in.

    Attributes:
        folder: with config.json and safetensors files.
        config: config.json.
        files: the weight files' names, in order.
        specs: every tensor, in the order of the files.
        file_of: tensor -> file.
    """

    folder: Path
    config: dict[str, Any]
    files: tuple[str, ...]
    specs: dict[str, TensorSpec]
    file_of: dict[str, str]

    @classmethod
    def open(cls, folder: Path, *, quantized: bool = False) -> Checkpoint:
        """Read config, index and the headers of all weight files; no weights yet.

        Args:
            quantized: take a folder whose weights are quantised already, which is refused otherwise.

        Raises:
            ExportError: files are missing, cut, or of another kind.
        """
        config = _json(folder / "config.json", "a model folder has one")
        if "quantization_config" in config and not quantized:
            found = config["quantization_config"]
            method = found.get("quant_method", "?") if isinstance(found, dict) else found
            raise ExportError(f"{folder} is quantised already ({method}); give the 16-bit model")
        files = _weight_files(folder)
        specs: dict[str, TensorSpec] = {}
        file_of: dict[str, str] = {}
        for file, listed in files.items():
            held = read_specs(folder / file)
            lost = sorted(set(listed) - set(held))
            if lost:
                raise ExportError(
                    f"{folder / file} does not hold {lost[0]}, which {INDEX} says; get it again"
                )
            for name in sorted(listed or held):
                specs[name], file_of[name] = held[name], file
        checkpoint = cls(folder, config, tuple(files), specs, file_of)
        checkpoint._check_head()
        return checkpoint

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(spec.nbytes for spec in self.specs.values())

    @cached_property
    def ties_embeddings(self) -> bool:
        """Whether readers use the embedding as output head, whatever head is stored.

        config.json leaves out what is the architecture's default, which transformers knows.
        """
        said = self.config.get("tie_word_embeddings")
        if said is not None:
            return bool(said)
        from transformers import AutoConfig

        try:
            return bool(AutoConfig.for_model(self.config.get("model_type", "")).tie_word_embeddings)
        except ValueError:  # an architecture that transformers has not
            return HEAD not in self.specs

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding, and no head is stored apart."""
        return self.ties_embeddings and HEAD not in self.specs

    def names_in(self, file: str) -> list[str]:
        """The tensors of one weight file."""
        return [name for name, place in self.file_of.items() if place == file]

    def load(self, names: Iterable[str], *, check: bool = True) -> dict[str, Tensor]:
        """Tensors by name, in memory of their own.

        Args:
            check: refuse NaN and infinities.

        Raises:
            ExportError: no such tensor, or values that are no numbers.
        """
        wanted = list(names)
        for name in wanted:
            self._check_there(name)
        loaded: dict[str, Tensor] = {}
        for file in dict.fromkeys(self.file_of[name] for name in wanted):
            with self.reading(file) as reader:
                for name in wanted:
                    if self.file_of[name] == file:
                        tensor = reader.get_tensor(name).clone()  # the file's mapping ends with this block
                        if check:
                            check_finite(name, tensor, self.folder / file)
                        loaded[name] = tensor
        return loaded

    def tensor(self, name: str, *, check: bool = True) -> Tensor:
        """One tensor; see `load`."""
        return self.load([name], check=check)[name]

    def mapped(self, name: str) -> Tensor:
        """One tensor as a view of its file: read where it is looked at; not checked for NaN.

        Raises:
            ExportError: no such tensor.
        """
        self._check_there(name)
        with self.reading(self.file_of[name]) as reader:
            return reader.get_tensor(name)

    def check_finite(self, name: str) -> None:
        """Refuse a tensor whose values are no numbers; only its pages of the file are read.

        Raises:
            ExportError: counts its NaN and infinities.
        """
        check_finite(name, self.mapped(name), self.folder / self.file_of[name])

    @contextlib.contextmanager
    def reading(self, file: str) -> Iterator[Any]:
        """`safe_open` of one weight file: `get_tensor(name)` maps it, so pages count as used until the end.

        Raises:
            ExportError: the file is gone or damaged.
        """
        path = self.folder / file
        try:
            with safe_open(path, framework="pt") as reader:
                yield reader
        except (SafetensorError, FileNotFoundError) as error:
            raise ExportError(f"{path} can't be read ({error}); get the model again") from error

    def sha256(self, file: str) -> str:
        """Of one of the folder's files."""
        return sha256(self.folder / file)

    def _check_there(self, name: str) -> None:
        if name not in self.specs:
            raise ExportError(f"{self.folder} has no tensor {name}; get the model again")

    def _check_head(self) -> None:
        packed = HEAD.removesuffix("weight")  # the parts of a quantised head have other names
        if EMBEDDING not in self.specs or any(name.startswith(packed) for name in self.specs):
            return
        if not self.ties_embeddings:
            raise ExportError(
                f"{self.folder} has no {HEAD}, and by config.json it is not tied to the embedding; "
                "get the model again"
            )

    def check_tied_head(self) -> str | None:
        """A note where the head is tied to the embedding and the files hold another head, never used."""
        if HEAD not in self.specs or not self.ties_embeddings:
            return None
        pair = self.load([HEAD, EMBEDDING])
        if torch.equal(pair[HEAD], pair[EMBEDDING]):
            return None
        return f"{HEAD} differs from the embedding that config.json ties it to; readers use the embedding"


def _weight_files(folder: Path) -> dict[str, list[str]]:
    """File -> the tensors that the index lists for it (none without an index)."""
    if (folder / INDEX).is_file():
        weight_map = _json(folder / INDEX, "").get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ExportError(f"{folder / INDEX} has no weight_map; get the model again")
        files: dict[str, list[str]] = {file: [] for file in sorted(set(weight_map.values()))}
        for name, file in weight_map.items():
            files[file].append(name)
        return files
    if (folder / WEIGHTS).is_file():
        return {WEIGHTS: []}
    others = [path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".gguf")]
    kind = f"it has {others[0]}; convert it to safetensors first" if others else "give a whole model folder"
    raise ExportError(f"{folder} has neither {WEIGHTS} nor {INDEX}; {kind}")


def _json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ExportError(f"{path} is missing; {remedy}") from error
    except ValueError as error:
        raise ExportError(f"{path} can't be read: {error}; get the model again") from error
    if not isinstance(value, dict):
        raise ExportError(f"{path} is no JSON object; get the model again")
    return value
