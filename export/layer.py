"""One decoder layer at work: its weights in memory, calibration states streamed through it.

A stage's inputs are those of the layer with all earlier stages quantised already (true-sequential). Where
one chunk holds all windows, the layer runs once: each stage is quantised in the middle of its forward.
Several chunks run up to the stage, one after the other, and again for the next; what a finished child of the
layer gave out (the attention) is kept and not computed twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .chunks import Chunks
from .formats.quantized import QuantizedLinear
from .memory import release_free_memory
from .rounding.gram import GramSum
from .structure import Stage

OnStage = Callable[[Stage, GramSum], None]


AT_ONCE = 2**23  # weights dequantised at once


class Source(Protocol):
    """Where weights come from: a Checkpoint, or MergedWeights."""

    def load(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Tensors by full name."""
        ...


def fill(module: nn.Module, prefix: str, source: Source, *, dtype: torch.dtype, device: torch.device) -> None:
    """Put a module's parameters, on `meta` before, in memory."""
    names = [name for name, _ in module.named_parameters()]
    loaded = source.load([f"{prefix}.{name}" for name in names])
    for name in names:
        set_parameter(module, name, loaded.pop(f"{prefix}.{name}").to(device, dtype))


def empty(module: nn.Module) -> None:
    """Put a module's parameters back to `meta`."""
    for name, parameter in list(module.named_parameters()):
        set_parameter(module, name, parameter.detach().to("meta"))


def set_parameter(module: nn.Module, name: str, values: Tensor) -> None:
    """Replace a parameter, of whatever dtype and device."""
    place, _, parameter = name.rpartition(".")
    module.get_submodule(place)._parameters[parameter] = nn.Parameter(values, requires_grad=False)


def put_dequantized(module: nn.Module, name: str, quantized: QuantizedLinear) -> None:
    """Overwrite a linear module's weight with the values of its quantised one, rows by rows."""
    weight = module.get_submodule(name).get_parameter("weight")
    step = max(1, AT_ONCE // weight.shape[1])
    for first in range(0, weight.shape[0], step):
        weight.data[first : first + step] = quantized.rows(first, first + step).dequantize()


@dataclass(frozen=True, slots=True)
class Stream:
    """A decoder layer and what goes through it.

    Attributes:
        layer: its parameters in memory.
        call: its keyword arguments.
        states, out: hidden states before and after; `out` is appended to.
    """

    layer: nn.Module
    call: dict[str, Any]
    states: Chunks
    out: Chunks


@torch.no_grad()
def run_layer(
    stream: Stream,
    stages: Sequence[Stage],
    on_stage: OnStage,
    kept: Callable[[], Chunks],
    original: Stream | None = None,
) -> None:
    """Send all chunks through a layer, quantise it on the way and give its weights' memory back.

    Args:
        stages: in the order of running.
        on_stage: called with each stage and the sums over its inputs; it changes the layer's weights.
        kept: makes an empty store for what a child of the layer gave out.
        original: the same layer of the original model with its own states: sums are over both then.
    """
    if len(stream.states) == 1:
        _run_once(stream, stages, on_stage, original)
        return
    running = _Children(stream, kept)
    beside = None if original is None else _Children(original, kept)
    for stage in stages:
        sums = None
        for each in (running, beside):
            if each is not None:
                each.enter(stage.container)
        for index in range(len(stream.states)):
            inputs = running.run_until(stage, index)
            reference = None if beside is None else beside.run_until(stage, index)
            sums = sums or _sums_for(inputs, reference)
            sums.add(inputs, reference)
            del inputs, reference  # rounding needs the memory
        if beside is not None and stage is stages[-1]:  # rounding needs the memory of its weights as well
            beside.finish()
        if sums is not None:
            on_stage(stage, sums)
    running.finish()


def _run_once(stream: Stream, stages: Sequence[Stage], on_stage: OnStage, original: Stream | None) -> None:
    references = {} if original is None else _run_original(original, stages)

    def reached(stage: Stage) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            reference = references.pop(stage, None)
            sums = _sums_for(inputs[0], reference)
            sums.add(inputs[0], reference)
            del reference
            on_stage(stage, sums)

        return hook

    with _before_stages(stream.layer, stages, reached):
        stream.out.append(_states(stream.layer(stream.states[0], **stream.call)))
    empty(stream.layer)


def _run_original(original: Stream, stages: Sequence[Stage]) -> dict[Stage, Tensor]:
    seen: dict[Stage, Tensor] = {}

    def reached(stage: Stage) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: seen.update({stage: inputs[0]})

    with _before_stages(original.layer, stages, reached):
        original.out.append(_states(original.layer(original.states[0], **original.call)))
    empty(original.layer)
    release_free_memory()
    return seen


@contextlib.contextmanager
def _before_stages(
    layer: nn.Module, stages: Sequence[Stage], hook: Callable[[Stage], Callable[..., None]]
) -> Iterator[None]:
    with contextlib.ExitStack() as hooks:
        for stage in stages:
            first = layer.get_submodule(stage.linears[0])
            hooks.callback(first.register_forward_pre_hook(hook(stage)).remove)
        yield


def _sums_for(inputs: Tensor, reference: Tensor | None) -> GramSum:
    return GramSum(inputs.shape[-1], drift=reference is not None, device=inputs.device)


def _states(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


class _Reached(Exception):
    def __init__(self, inputs: Tensor) -> None:
        self.inputs = inputs


class _Children:
    """Runs a layer whose finished children give what they gave before."""

    def __init__(self, stream: Stream, kept: Callable[[], Chunks]) -> None:
        self._stream = stream
        self._layer = stream.layer
        self._kept = kept
        self._current: str | None = None
        self._fresh: str | None = None  # finished, its output not kept yet
        self._outputs: dict[str, Chunks] = {}
        self._others: dict[str, tuple[Any, ...] | None] = {}  # what a child's tuple holds besides its output

    def enter(self, container: str | None) -> None:
        """Say which child is worked at; the one before is finished."""
        if self._fresh is not None and len(self._outputs[self._fresh]):
            self._fresh = None
        if container != self._current and self._current is not None and container is not None:
            self._fresh = self._current
            self._outputs[self._fresh] = self._kept()
        self._current = container

    def run_until(self, stage: Stage, index: int) -> Tensor:
        """A chunk's inputs of a stage's linear modules."""

        def stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            raise _Reached(inputs[0])

        handle = self._layer.get_submodule(stage.linears[0]).register_forward_pre_hook(stop)
        try:
            self._run(index)
        except _Reached as reached:
            return reached.inputs
        finally:
            handle.remove()
        raise RuntimeError(f"{stage.linears[0]} was not reached")

    def finish(self) -> None:
        """Send all chunks through the whole layer, and give its weights back."""
        self.enter(None)
        for index in range(len(self._stream.states)):
            self._stream.out.append(self._run(index))
        for outputs in self._outputs.values():
            outputs.clear()
        empty(self._layer)

    def _run(self, index: int) -> Tensor:
        with contextlib.ExitStack() as restore:
            for name, outputs in self._outputs.items():
                child = self._layer.get_submodule(name)
                if name == self._fresh:
                    restore.callback(child.register_forward_hook(self._keeper(name)).remove)
                else:
                    others = self._others[name]
                    answer = outputs[index] if others is None else (outputs[index], *others)
                    restore.enter_context(_answers(child, answer))
            return _states(self._layer(self._stream.states[index], **self._stream.call))

    def _keeper(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            self._outputs[name].append(_states(output))
            self._others[name] = output[1:] if isinstance(output, tuple) else None

        return keep


@contextlib.contextmanager
def _answers(child: nn.Module, answer: Any) -> Iterator[None]:
    child.forward = lambda *_, **__: answer
    try:
        yield
    finally:
        del child.forward
