"""One decoder layer at work: its weights in memory, calibration states streamed through it.

A stage's inputs are those of the layer with all earlier stages quantised already (true-sequential): every
chunk runs up to the stage, and goes on from there for the next. So that nothing is computed twice, the inputs
of the last linear module of a child (o, down) are kept: the child gives out what that module does once
it is quantised.
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
        states, out: hidden states before and after; those are taken, these appended.
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
        kept: makes an empty store for what is kept of the chunks.
        original: the same layer of the original model with its own states: sums are over both then.
    """
    changing = _Changing(stream, kept)
    beside = None if original is None else _Unchanged(original, kept)
    for stage in stages:
        sums = None
        for index in range(len(stream.states)):
            seen = changing.run_until(stage, index)
            reference = None if beside is None else beside.run_through(stage, index, last=stage is stages[-1])
            sums = sums or _sums_for(seen, reference)
            if reference is None:
                sums.add(seen.inputs)
            else:
                sums.add(seen.inputs, reference.inputs, _behind(seen, reference))
            del seen, reference  # rounding needs the memory
        if beside is not None:
            beside.done(stage, last=stage is stages[-1])
        release_free_memory()
        if sums is not None:
            on_stage(stage, sums)
        changing.done(stage)
    changing.finish()


@dataclass(frozen=True, slots=True)
class _Seen:
    """A chunk at a stage.

    Attributes:
        inputs: of its linear modules.
        residual: what their output is going to be added to; None where it is not known or not asked for.
    """

    inputs: Tensor
    residual: Tensor | None


def _sums_for(seen: _Seen, reference: _Seen | None) -> GramSum:
    x, r = seen.inputs, None if reference is None else reference.residual
    outputs = 0 if r is None else r.shape[-1]
    return GramSum(x.shape[-1], drift=reference is not None, outputs=outputs, device=x.device)


def _behind(seen: _Seen, reference: _Seen) -> Tensor | None:
    """By how much what the output is added to lags behind the original model's."""
    if seen.residual is None or reference.residual is None:
        return None
    return reference.residual - seen.residual


def _states(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


class _Reached(Exception):
    """What is wanted of a layer's run has been seen."""


class _Running:
    """A layer in which a child that is done gives what it gave before."""

    def __init__(self, stream: Stream, kept: Callable[[], Chunks]) -> None:
        self._stream = stream
        self._layer = stream.layer
        self._kept = kept
        self._outputs: dict[str, tuple[Chunks, int]] = {}  # child -> what it gave, of how many values

    def _run(self, index: int, *, last: bool = False) -> Tensor:
        """A chunk through the layer; for the last time, nothing is kept of it."""
        read = Chunks.take if last else Chunks.__getitem__
        with contextlib.ExitStack() as restore:
            for name, (outputs, values) in self._outputs.items():
                output = read(outputs, index)
                answer = output if values == 1 else (output, *[None] * (values - 1))
                restore.enter_context(_answers(self._layer.get_submodule(name), answer))
            return _states(self._layer(read(self._stream.states, index), **self._stream.call))

    def _watch(self, stage: Stage, hooks: contextlib.ExitStack, *, stop: bool) -> Callable[[], _Seen]:
        """What a run comes to at a stage, which ends it if `stop`."""
        residual: list[Tensor] = []
        inputs: list[Tensor] = []

        def reach(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            inputs.append(given[0])
            if stop:
                raise _Reached

        if stage.residual is not None:
            reader = self._layer.get_submodule(stage.residual)
            handle = reader.register_forward_pre_hook(lambda _, given: residual.append(given[0]))
            hooks.callback(handle.remove)
        hooks.callback(self._layer.get_submodule(stage.linears[0]).register_forward_pre_hook(reach).remove)
        return lambda: _Seen(inputs[0], residual[0] if residual else None)

    def _close(self) -> None:
        for outputs, _ in self._outputs.values():
            outputs.clear()
        empty(self._layer)


class _Changing(_Running):
    """The layer that is quantised."""

    def __init__(self, stream: Stream, kept: Callable[[], Chunks]) -> None:
        super().__init__(stream, kept)
        self._inputs = kept()

    def run_until(self, stage: Stage, index: int) -> _Seen:
        """A chunk up to a stage's linear modules; the inputs of a child's last one are kept."""
        with contextlib.ExitStack() as hooks:
            seen = self._watch(stage, hooks, stop=True)
            with contextlib.suppress(_Reached):
                self._run(index)
        found = seen()
        if stage.gives is not None:
            self._inputs.append(found.inputs)
        return found

    def done(self, stage: Stage) -> None:
        """Say that a stage is quantised: what its child gives out is its output now, where it is the last."""
        if stage.gives is None:
            return
        outputs = self._kept()
        for index in range(len(self._inputs)):
            outputs.append(self._layer.get_submodule(stage.linears[0])(self._inputs.take(index)))
        self._inputs.clear()
        self._inputs = self._kept()
        self._outputs[stage.container] = (outputs, stage.gives)

    def finish(self) -> None:
        """Give the states behind the layer, and its memory back."""
        for index in range(len(self._stream.states)):
            self._stream.out.append(self._run(index, last=True))
        self._close()


class _Unchanged(_Running):
    """The same layer of the original model."""

    def __init__(self, stream: Stream, kept: Callable[[], Chunks]) -> None:
        super().__init__(stream, kept)
        self._given = kept()

    def run_through(self, stage: Stage, index: int, *, last: bool) -> _Seen:
        """A chunk up to a stage's linear modules; at a child's last stage it gives its output too."""

        def give(_: nn.Module, __: Any, output: Any) -> None:
            self._given.append(_states(output))
            raise _Reached

        with contextlib.ExitStack() as hooks:
            seen = self._watch(stage, hooks, stop=stage.gives is None)
            if last:
                self._stream.out.append(self._run(index, last=True))
                return seen()
            child = self._layer.get_submodule(stage.container)
            hooks.callback(child.register_forward_hook(give).remove)
            with contextlib.suppress(_Reached):
                self._run(index)
        return seen()

    def done(self, stage: Stage, *, last: bool) -> None:
        """Say that all chunks went through a stage; after the layer's last its memory is given back."""
        if last:
            self._close()
        elif stage.gives is not None:
            self._outputs[stage.container] = (self._given, stage.gives)
            self._given = self._kept()


@contextlib.contextmanager
def _answers(child: nn.Module, answer: Any) -> Iterator[None]:
    child.forward = lambda *_, **__: answer
    try:
        yield
    finally:
        del child.forward
