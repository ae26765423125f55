"""A quantised model folder read back: GPTQ (v1, v2), AWQ GEMM or compressed-tensors, whoever wrote it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .completeness import expected_tensors
from .containers import MARKS, PARTS, SCALES, Container, packed_specs
from .errors import ExportError
from .formats import awq, compressed_tensors, gptq
from .formats.quantized import QuantizedLinear
from .formats.scheme import Scheme
from .formats.words import pack_columns, unpack_columns
from .nf4_base import empty_model
from .tensors import check_finite

V2 = "gptq_v2"
OPTIONAL = {"compressed-tensors": ("weight_zero_point", "weight_g_idx")}


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """Weights by name as a reader computes them: dequantised where they are packed.

    Attributes:
        checkpoint: the folder's files.
        container: how they are packed.
        version: of GPTQ, `gptq` or `gptq_v2`; the container's name otherwise.
        schemes: of every packed module by full name.
    """

    checkpoint: Checkpoint
    container: Container
    version: str
    schemes: dict[str, Scheme]
    _finite: set[str] = field(default_factory=set)  # looked at already

    @classmethod
    def open(cls, folder: Path) -> QuantizedCheckpoint:
        """Read the headers and the configuration; no weights yet.

        Raises:
            ExportError: it is not quantised, or in a way that is not known here; damaged files.
        """
        checkpoint = Checkpoint.open(folder, quantized=True)
        found = _configuration(folder, checkpoint.config)
        container, version = _container(folder, found)
        mark = f".{MARKS[container]}"
        modules = [name.removesuffix(mark) for name in checkpoint.specs if name.endswith(mark)]
        if not modules:
            raise ExportError(
                f"{folder}: config.json says {container}, but no tensor is packed so; get the model again"
            )
        schemes = {module: _scheme(folder, container, found, module) for module in modules}
        return cls(checkpoint, container, version, schemes)

    def check_complete(self) -> None:
        """Compare names and shapes of all tensors with what the architecture needs.

        Raises:
            ExportError: names the first tensor that is missing or has another shape.
        """
        folder, specs = self.checkpoint.folder, self.checkpoint.specs
        for name, shape in expected_tensors(self.checkpoint, empty_model(folder)).items():
            module = name.removesuffix(".weight")
            if name.endswith(".weight") and module in self.schemes:
                rows, columns = shape
                expected = packed_specs(self.container, module, (rows, columns), self.schemes[module])
                wanted = {its.name: its.shape for its in expected}
            else:
                wanted = {name: shape}
            for tensor, its in wanted.items():
                if tensor not in specs:
                    raise ExportError(f"{folder} has no tensor {tensor}; export or get the model again")
                if specs[tensor].shape != its:
                    raise ExportError(
                        f"{folder}: {tensor} is {list(specs[tensor].shape)}, by config.json it must be "
                        f"{list(its)}; export or get the model again"
                    )

    def weight(self, name: str) -> Tensor:
        """A tensor by the name that it has in a 16-bit checkpoint; packed ones as float32 [N, K].

        Raises:
            ExportError: values that are no numbers, or that do not go together.
        """
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in self.schemes:
            return self.dequantized(module)
        if name not in self.checkpoint.specs:
            raise ExportError(f"{self.checkpoint.folder} has no tensor {name}; export or get the model again")
        if name not in self._finite:
            self.checkpoint.check_finite(name)
            self._finite.add(name)
        return self.checkpoint.mapped(name)

    def dequantized(self, module: str) -> Tensor:
        """W of a packed module, [N, K] float32; scales of whatever float dtype are used as they are."""
        tensors = self._tensors(module)
        key = SCALES[self.container]
        scales = tensors[key]
        where = self.checkpoint.folder / self.checkpoint.file_of[f"{module}.{key}"]
        check_finite(f"{module}.{key}", scales, where)
        ones = tensors | {key: torch.ones_like(scales, dtype=torch.float16)}
        try:
            linear = self._unpack(ones, self.schemes[module])
        except (ValueError, ExportError) as error:
            raise ExportError(f"{where}: {module}: {error}; export or get the model again") from error
        per_group = scales if self.container == "compressed-tensors" else scales.t()  # [N, G]
        return linear.dequantize().mul_(per_group.to(torch.float32)[:, linear.groups_of_columns().long()])

    def _tensors(self, module: str) -> dict[str, Tensor]:
        names = [f"{module}.{part}" for part in PARTS[self.container]]
        names += [
            f"{module}.{part}"
            for part in OPTIONAL.get(self.container, ())
            if f"{module}.{part}" in self.checkpoint.specs
        ]
        lost = [name for name in names if name not in self.checkpoint.specs]
        if lost:
            raise ExportError(
                f"{self.checkpoint.folder} has no tensor {lost[0]}; export or get the model again"
            )
        return {name.rpartition(".")[2]: tensor for name, tensor in self.checkpoint.load(names).items()}

    def _unpack(self, tensors: dict[str, Tensor], scheme: Scheme) -> QuantizedLinear:
        if self.container == "awq":
            return awq.unpack(tensors, scheme)
        if self.container == "compressed-tensors":
            linear = compressed_tensors.unpack(tensors, scheme)
            g_idx = tensors.get("weight_g_idx")
            return linear if g_idx is None else replace(linear, g_idx=g_idx.to(torch.int32))
        return _unpack_gptq(tensors, scheme, self.version)


def _unpack_gptq(tensors: dict[str, Tensor], scheme: Scheme, version: str) -> QuantizedLinear:
    """v2 stores z itself. v1's z - 1 is taken as GPTQModel does where it is below 0: in whole words."""
    stored = unpack_columns(tensors["qzeros"], scheme.bits).to(torch.int16)  # [G, N]
    if version == V2:
        zeros = stored
    else:
        zeros = stored + 1
        if int(zeros.max()) > scheme.top:
            ones = sum(1 << (scheme.bits * place) for place in range(32 // scheme.bits))
            words = tensors["qzeros"].to(torch.int64) + ones
            signed = ((words + 2**31) % 2**32 - 2**31).to(torch.int32)
            zeros = unpack_columns(signed, scheme.bits).to(torch.int16)
    middle = torch.full_like(stored, scheme.middle - 1, dtype=torch.uint8)
    symmetric = replace(scheme, symmetric=True)
    linear = gptq.unpack(tensors | {"qzeros": pack_columns(middle, scheme.bits)}, symmetric)
    values = zeros.t().to(torch.uint8).contiguous()
    if bool((values == scheme.middle).all()):
        return linear
    if scheme.symmetric:
        raise ExportError(f"a symmetric GPTQ module has zero points other than {scheme.middle}")
    return replace(linear, zeros=values)


def _configuration(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    found = config.get("quantization_config")
    beside = folder / gptq.CONFIG_FILE
    if found is None and beside.is_file():
        try:
            found = {"quant_method": "gptq"} | json.loads(beside.read_text(encoding="utf-8"))
        except (ValueError, TypeError) as error:
            raise ExportError(f"{beside} can't be read: {error}; get the model again") from error
    if not isinstance(found, dict):
        raise ExportError(f"{folder} is not quantised: its config.json has no quantization_config")
    return found


def _container(folder: Path, found: Mapping[str, Any]) -> tuple[Container, str]:
    method = str(found.get("quant_method", "?"))
    if method == "gptq":
        version = str(found.get("checkpoint_format", found.get("format", "gptq")))
        if version in ("gptq", V2):
            return "gptq", version
        method = f"gptq in {version} layout"
    elif method == "awq":
        version = str(found.get("version", "gemm")).lower()
        if version == "gemm":
            return "awq", "awq"
        method = f"awq in {version} layout"
    elif method == "compressed-tensors":
        layout = str(found.get("format", "?"))
        if layout == "pack-quantized":
            return "compressed-tensors", "compressed-tensors"
        method = f"compressed-tensors in {layout} layout"
    raise ExportError(
        f"{folder} is quantised as {method}; GPTQ (v1, v2), AWQ GEMM and compressed-tensors pack-quantized "
        "can be read"
    )


def _scheme(folder: Path, container: Container, found: Mapping[str, Any], module: str) -> Scheme:
    try:
        if container == "compressed-tensors":
            return _compressed_scheme(found, module)
        its = dict(found)
        for rule, changes in (found.get("dynamic") or {}).items():
            if not rule.startswith("-") and re.match(rule.removeprefix("+:"), module):
                its |= changes
                break
        if container == "awq":
            return Scheme(int(its.get("bits", 4)), int(its.get("group_size", 128)), symmetric=False)
        return Scheme(
            int(its["bits"]),
            int(its["group_size"]),
            bool(its.get("sym", True)),
            bool(its.get("desc_act", False)),
        )
    except (KeyError, TypeError, ValueError, re.error) as error:
        raise ExportError(
            f"{folder}: quantization_config can't be understood for {module} ({error!r}); get the model again"
        ) from error


def _compressed_scheme(found: Mapping[str, Any], module: str) -> Scheme:
    groups = list(found["config_groups"].values())
    named = [group for group in groups if any(_targets(target, module) for target in group["targets"])]
    weights = (named or [group for group in groups if "Linear" in group["targets"]])[0]["weights"]
    size = weights.get("group_size")
    return Scheme(
        int(weights["num_bits"]),
        -1 if weights.get("strategy") == "channel" or size is None else int(size),
        bool(weights.get("symmetric", True)),
    )


def _targets(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target == module
