"""What a decoder layer is made of, found by running it on `meta` and watching who reads whose output."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .checkpoint import EMBEDDING
from .errors import ExportError
from .nf4_base import empty_model

HEAD = "lm_head"


@dataclass(frozen=True, slots=True)
class Stage:
    """Linear modules of a layer that read the same tensor; stages stand in the order of their running.

    Attributes:
        linears: names within the layer.
        norm: the norm whose output they read and no other linear module does, None where there is none.
        container: the layer's child that holds them.
        gives: how many values the container gives out after this stage, first the output of its only linear
            module, the others None; 1 is a tensor, more are a tuple. None where the container goes on.
        residual: a module whose input that output is added to (a norm, which reads the residual stream
            first); None where it is added to nothing that a module has read.
    """

    linears: tuple[str, ...]
    norm: str | None
    container: str
    gives: int | None = None
    residual: str | None = None


@dataclass(frozen=True, slots=True)
class Link:
    """Output channels of one linear module that only scale the input channels of another.

    Attributes:
        before, after: names within the layer.
        head_dim: channels of a head, and
        repeats: how many heads in a row of `after`'s input a head of `before` is repeated to (GQA).
    """

    before: str
    after: str
    head_dim: int
    repeats: int


@dataclass(frozen=True, slots=True)
class Structure:
    """A causal LM's module tree, parameters on `meta`, and the parts of its decoder layers.

    Attributes:
        model: transformers' own classes; its buffers are real.
        layers: the decoder layers' name, e.g. `model.layers`.
        stages: of each layer; all layers are alike.
        links: v -> o and up -> down, where shapes permit.
    """

    model: Any
    layers: str
    stages: tuple[Stage, ...]
    links: tuple[Link, ...]

    @property
    def count(self) -> int:
        """Decoder layers."""
        return len(self.model.get_submodule(self.layers))

    def layer(self, index: int) -> nn.Module:
        """A decoder layer."""
        return self.model.get_submodule(f"{self.layers}.{index}")

    def module(self, index: int, name: str) -> str:
        """The full name of a module of a layer."""
        return f"{self.layers}.{index}.{name}"

    def linears(self) -> dict[str, nn.Linear]:
        """Every linear module of the decoder layers by its full name."""
        return {
            self.module(index, name): linear(self.layer(index), name)
            for index in range(self.count)
            for stage in self.stages
            for name in stage.linears
        }


def linear(layer: nn.Module, name: str) -> nn.Linear:
    """A linear module of a layer by its name within it."""
    module = layer.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{name} is {type(module).__name__}, not a linear module")
    return module


def find_structure(folder: Path, model: Any = None) -> Structure:
    """Read the structure from a model folder's config.json and transformers' classes.

    Args:
        model: the folder's `empty_model`, where it is there already.

    Raises:
        ExportError: transformers has no such architecture, or its layers are not made of linear modules
            that are all alike.
    """
    model = empty_model(folder) if model is None else model
    layers = _decoder_layers(model)
    _check_supported(folder, model, layers)
    calls = layer_calls(model, layers, torch.ones(1, 4, model.config.hidden_size))
    stages, sizes = None, None
    for index, call in enumerate(calls):
        layer = model.get_submodule(f"{layers}.{index}")
        found = _trace(layer, call, model.config.hidden_size)
        for container in dict.fromkeys(stage.container for stage in found):
            if [stage.gives for stage in found if stage.container == container][-1] is None:
                raise ExportError(
                    f"{folder}: what {layers}.{index}.{container} gives out is not its last linear module's "
                    "output; Qwen2, Qwen3, Llama and Mistral are supported"
                )
        shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
        if stages is None:
            stages, sizes = found, shapes
        elif (found, shapes) != (stages, sizes):
            raise ExportError(
                f"{folder}: {layers}.{index} is built differently from {layers}.0, which is not supported"
            )
    if not stages:
        raise ExportError(f"{folder}: the decoder layers hold no linear modules, nothing can be quantised")
    first = model.get_submodule(f"{layers}.0")
    return Structure(model, layers, stages, tuple(_links(first, stages)))


def layer_calls(model: Any, layers: str, embedded: Tensor) -> list[dict[str, Any]]:
    """The keyword arguments with which the model calls each of its layers: positions, masks.

    Args:
        embedded: [1, T, H], of the length and dtype that the layers will see; its values do not matter.
    """
    decoder = model.get_submodule(layers.rpartition(".")[0])
    calls: list[dict[str, Any]] = []

    def record(hidden_states: Tensor, **call: Any) -> Tensor:
        if not torch.equal(hidden_states, embedded):
            raise _scaled(model)
        calls.append(call)
        return hidden_states

    with contextlib.ExitStack() as restore:
        for layer in model.get_submodule(layers):
            _replace_forward(restore, layer, record)
        for module in decoder.children():
            if any(p.is_meta for p in module.parameters(recurse=False)):  # the last norm
                _replace_forward(restore, module, lambda hidden_states: hidden_states)
        with torch.inference_mode():
            decoder(inputs_embeds=embedded, use_cache=False)
    return calls


def _replace_forward(restore: contextlib.ExitStack, module: nn.Module, forward: Any) -> None:
    module.forward = forward
    restore.callback(delattr, module, "forward")


def _decoder_layers(model: nn.Module) -> str:
    """The longest list of modules that hold linear modules."""
    lists = {
        name: len(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(isinstance(part, nn.Linear) for part in module.modules())
    }
    if not lists:
        raise ExportError(
            f"{type(model).__name__} has no list of decoder layers; "
            "Qwen2, Qwen3, Llama and Mistral are supported"
        )
    return max(lists, key=lambda name: lists[name])


def _check_supported(folder: Path, model: nn.Module, layers: str) -> None:
    """Weights that are no linear module's (experts in one tensor) would be left in 16 bits without a word."""
    for layer, module in model.get_submodule(layers).named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1 and not isinstance(module, nn.Linear):
                raise ExportError(
                    f"{folder}: {layers}.{layer}.{name} belongs to a {type(module).__name__}, which can't be "
                    "quantised; Qwen2, Qwen3, Llama and Mistral (without experts) are supported"
                )
    if EMBEDDING not in dict(model.named_parameters()):
        raise ExportError(
            f"{folder}: {type(model).__name__} has no {EMBEDDING}; "
            "Qwen2, Qwen3, Llama and Mistral are supported"
        )
    if type(model.get_submodule(EMBEDDING.rpartition(".")[0])) is not nn.Embedding:
        raise _scaled(model)


def _scaled(model: nn.Module) -> ExportError:
    return ExportError(
        f"{type(model).__name__} changes the embedding before its first layer, which is not supported; "
        "Qwen2, Qwen3, Llama and Mistral are supported"
    )


def _trace(layer: nn.Module, call: dict[str, Any], width: int) -> tuple[Stage, ...]:
    names = {module: name for name, module in layer.named_modules()}
    read: list[tuple[str, Tensor]] = []  # (linear, its input) in the order of running
    made: list[tuple[str, Tensor]] = []  # (norm, its output)
    given: dict[str, Any] = {}
    taken: dict[str, Tensor] = {}

    def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        given[names[module]] = output
        if inputs:
            taken[names[module]] = inputs[0]
        if isinstance(module, nn.Linear):
            read.append((names[module], inputs[0]))
        elif _scales_its_output(module):
            made.append((names[module], output))

    sums = _Sums()
    with _hooks(layer, watch), torch.inference_mode(), sums:
        layer(torch.zeros(1, 4, width, device="meta"), **_to_meta(call))
    stages = []
    for tensor in _distinct(tensor for _, tensor in read):
        linears = tuple(name for name, seen in read if seen is tensor)
        norms = [name for name, output in made if output is tensor]
        container = linears[0].split(".")[0]
        gives = _values(given[container], given[linears[0]]) if len(linears) == 1 else None
        residual = None
        if gives is not None:
            other = sums.added_to(given[linears[0]])
            residual = next((name for name, first in taken.items() if first is other), None)
        stages.append(Stage(linears, norms[0] if norms else None, container, gives, residual))
    return tuple(stages)


class _Sums(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers what was added to what."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._pairs: list[tuple[Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.add.Tensor and not (kwargs or {}):
            self._pairs.append((args[0], args[1]))
        return func(*args, **(kwargs or {}))

    def added_to(self, output: Tensor) -> Any:
        """The other one of a sum; None where there is no sum, or more than one."""
        pairs = [pair for pair in self._pairs if any(part is output for part in pair)]
        others = [right if left is output else left for left, right in pairs]
        return others[0] if len(others) == 1 else None


def _values(output: Any, first: Tensor) -> int | None:
    """How many values `output` has, if it is `first` or a tuple of `first` and Nones."""
    if output is first:
        return 1
    if isinstance(output, tuple) and output[0] is first and all(part is None for part in output[1:]):
        return len(output)
    return None


def _scales_its_output(module: nn.Module) -> bool:
    """Whether a norm's weight multiplies what it gives out, channel by channel (tried, not looked up)."""
    parameters = dict(module.named_parameters())
    if set(parameters) != {"weight"} or parameters["weight"].dim() != 1:
        return False
    width = parameters["weight"].shape[0]
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, width, generator=generator)
    scale = torch.rand(width, generator=generator) + 0.5

    def run(weight: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"weight": weight}, (sample,))

    with _without_hooks(module):
        one, scaled = run(torch.ones(width)), run(scale)
    return bool(torch.allclose(one * scale, scaled, rtol=1e-5, atol=1e-6))


def _links(layer: nn.Module, stages: tuple[Stage, ...]) -> Iterator[Link]:
    """By the names that all of these architectures use; a wrong one would show in the exported model."""
    places = {name.rpartition(".")[2]: name for stage in stages for name in stage.linears}
    if {"v_proj", "o_proj"} <= places.keys():
        value, output = linear(layer, places["v_proj"]), linear(layer, places["o_proj"])
        attention: Any = layer.get_submodule(places["v_proj"].rpartition(".")[0])
        head_dim = int(getattr(attention, "head_dim", 0))
        made, taken = value.out_features, output.in_features
        if head_dim and made % head_dim == 0 and taken % made == 0:
            yield Link(places["v_proj"], places["o_proj"], head_dim, taken // made)
    if {"gate_proj", "up_proj", "down_proj"} <= places.keys():
        up, down = linear(layer, places["up_proj"]), linear(layer, places["down_proj"])
        if up.out_features == down.in_features:
            yield Link(places["up_proj"], places["down_proj"], up.out_features, 1)


@contextlib.contextmanager
def _hooks(layer: nn.Module, watch: Any) -> Iterator[None]:
    handles = [module.register_forward_hook(watch) for module in layer.modules() if module is not layer]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    hooks, module._forward_hooks = module._forward_hooks, type(module._forward_hooks)()
    try:
        yield
    finally:
        module._forward_hooks = hooks


def _distinct(tensors: Iterator[Tensor]) -> list[Tensor]:
    found: list[Tensor] = []
    for tensor in tensors:
        if not any(tensor is seen for seen in found):
            found.append(tensor)
    return found


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, dict):
        return {name: _to_meta(part) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_to_meta(part) for part in value)
    return value
