"""A LoRA adapter in PEFT's format: which weight gets which delta = scaling * B A."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .disk import sha256
from .errors import ExportError
from .tensors import TensorSpec, check_finite, read_specs, shape_text

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# what would make W' = W + scaling B A wrong; each is falsy in a plain LoRA adapter
_OTHER_ARITHMETIC = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "fan_in_fan_out",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "layer_replication",
    "kasa_config",
    "monteclora_config",
    "arrow_config",
)
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # others change the base's weights


@dataclass(frozen=True, slots=True)
class LoraDelta:
    """scaling * B A, with A [r, K], B [N, r]."""

    a: Tensor
    b: Tensor
    scaling: float

    def rows(self, first: int, last: int) -> Tensor:
        """Rows first .. last-1 of the delta, [last - first, K] float64."""
        return (self.b[first:last].to(torch.float64) @ self.a.to(torch.float64)).mul_(self.scaling)

    def in_float64(self) -> LoraDelta:
        """The same, its factors cast once for many calls of `rows`."""
        return LoraDelta(self.a.to(torch.float64), self.b.to(torch.float64), self.scaling)


@dataclass(frozen=True)
class Adapter:
    """A PEFT LoRA adapter; its weights are read module by module.

    Attributes:
        folder: with adapter_config.json and adapter_model.safetensors.
        config: adapter_config.json.
        shapes: module -> (N, K, r).
    """

    folder: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, int, int]]

    @classmethod
    def open(cls, folder: Path) -> Adapter:
        """Read the config and the names and shapes of the weights.

        Raises:
            ExportError: no adapter, a damaged one, or one that is more than W + scaling B A.
        """
        config = _config(folder)
        return cls(folder, config, _shapes(folder, read_specs(folder / WEIGHTS)))

    def check_fits(self, weights: Mapping[str, TensorSpec], base: object) -> None:
        """Refuse an adapter of another base.

        Raises:
            ExportError: a module that the base has not, or that has another shape there.
        """
        for module, (n, k, _) in self.shapes.items():
            spec = weights.get(f"{module}.weight")
            if spec is None:
                raise ExportError(
                    f"the adapter in {self.folder} is for another base: {base} has no {module}; "
                    "give the base that it was trained on"
                )
            if spec.shape != (n, k):
                raise ExportError(
                    f"the adapter in {self.folder} is for another base: {module} is {n} x {k} there and "
                    f"{shape_text(spec.shape)} in {base}; give the base that it was trained on"
                )

    def scaling(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA."""
        from peft.utils.other import get_pattern_key

        patterns = self.config.get("alpha_pattern") or {}
        alpha = patterns.get(get_pattern_key(list(patterns), module), self.config["lora_alpha"])
        rank = self.shapes[module][2]
        return float(alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank)

    def delta(self, module: str) -> LoraDelta:
        """A module's A and B.

        Raises:
            ExportError: NaN or infinite values.
        """
        with safe_open(self.folder / WEIGHTS, framework="pt") as file:
            parts = [file.get_tensor(f"{PREFIX}{module}.lora_{part}.weight").clone() for part in "AB"]
        for part, tensor in zip("AB", parts, strict=True):
            check_finite(f"{module}.lora_{part}", tensor, self.folder / WEIGHTS)
        return LoraDelta(parts[0], parts[1], self.scaling(module))

    def output(self, module: str, inputs: Tensor) -> Tensor | None:
        """scaling B A x in float32, what a module's output gains; None where the module has no adapter."""
        if module not in self.shapes:
            return None
        delta = self.delta(module)
        a, b = (part.to(inputs.device, torch.float32) for part in (delta.a, delta.b))
        return (inputs @ a.t() @ b.t()) * delta.scaling

    def hashes(self) -> dict[str, str]:
        """SHA-256 of its two files."""
        return {name: sha256(self.folder / name) for name in (CONFIG, WEIGHTS)}


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ExportError(
            f"{folder} holds no {CONFIG}; give a finished run, or an adapter's folder"
        ) from error
    except ValueError as error:
        raise ExportError(f"{path} can't be read: {error}; train the run again") from error
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ExportError(f"{path}: peft_type is {kind}, only LORA can be merged here; merge it with peft")
    for name in _OTHER_ARITHMETIC:
        if config.get(name):
            raise ExportError(
                f"{path}: {name} is set, which is more than W + scaling B A; merge it with peft"
            )
    if config.get("bias", "none") != "none":
        raise ExportError(f"{path}: bias is {config['bias']}, which is not merged here; merge it with peft")
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise ExportError(
            f"{path}: init_lora_weights is {start}, which starts from other base weights; merge it with peft"
        )
    return config


def _shapes(folder: Path, specs: Mapping[str, TensorSpec]) -> dict[str, tuple[int, int, int]]:
    found: dict[str, tuple[int, int, int]] = {}
    for name in specs:
        module, _, rest = name.removeprefix(PREFIX).rpartition(".lora_")
        if not name.startswith(PREFIX) or not module or rest not in ("A.weight", "B.weight"):
            raise ExportError(
                f"{folder / WEIGHTS}: {name} is no plain LoRA weight; merge the adapter with peft"
            )
        a, b = (specs.get(f"{PREFIX}{module}.lora_{part}.weight") for part in "AB")
        if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            raise ExportError(
                f"{folder / WEIGHTS}: A and B of {module} do not go together; train the run again"
            )
        found[module] = (b.shape[0], a.shape[1], a.shape[0])
    if not found:
        raise ExportError(f"{folder / WEIGHTS} holds no LoRA weights; train the run again")
    return found
