"""Where the files of a base model are, and whether its weights are packed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qtrain.errors import UserError
from qtrain.recipe.schema import ModelSettings

# what is read of a model on the hub
WANTED = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.py",
    "LICENSE*",
    "NOTICE*",
]
PACKED = {"gptq": "GPTQ", "awq": "AWQ", "compressed-tensors": "compressed-tensors"}  # by quant_method


def base_folder(name: str) -> str:
    """The folder or hub name behind `model.name`; `demo` is converted on first use.

    Raises:
        UserError: the name looks like a path, and there is no model in it.
    """
    if name == "demo":
        from qtrain.demo.base_model import demo_model_folder

        return str(demo_model_folder())
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"model.name: {name} holds no config.json; give a model folder or a hub name")
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(
            f"model.name: there is no folder {name}; give a model folder or a hub name (owner/name)"
        )
    return name


def base_on_disk(settings: ModelSettings) -> Path:
    """The folder of a base model; a hub name's files are fetched (or found in the cache).

    Raises:
        UserError: no such model.
    """
    folder = base_folder(settings.name)
    if Path(folder).is_dir():
        return Path(folder)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(folder, revision=settings.revision, allow_patterns=WANTED))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{folder} is no folder here, and can't be had from the hub: {reason}; "
            "check the name and the network, or give a local folder"
        ) from error


def check_trainable(folder: str, config: dict[str, Any] | None = None) -> None:
    """Refuse a base whose weights are packed.

    Args:
        config: what config.json holds; read where it is not given, and where there is such a folder.

    Raises:
        UserError: they are.
    """
    packed = packed_as(Path(folder).expanduser(), config)
    if packed is not None:
        raise UserError(
            f"model.name: the weights of {folder} are packed ({packed}), and training needs 16-bit ones; "
            "give the model that it was made of"
        )


def packed_as(folder: Path, config: dict[str, Any] | None = None) -> str | None:
    """How a model folder's weights are packed into a few bits, for people; None where they are not.

    Args:
        config: what config.json holds; read where it is not given.
    """
    if config is None:
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None  # whoever loads it says what is wrong with it
    found = (config or {}).get("quantization_config")
    if found is None and (folder / "quantize_config.json").is_file():
        return PACKED["gptq"]
    return PACKED.get(str(found.get("quant_method"))) if isinstance(found, dict) else None
