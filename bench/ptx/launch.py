"""Compile Triton kernels as a real launch would specialise them, and run them on the emulator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from .counters import Counters
from .executor import run

Edit = Callable[[str], str]


class _Pointer:
    """What Triton's specialiser wants of a tensor, for a numpy array: dtype and data_ptr()."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        import torch

        self.array = array
        self.dtype = getattr(torch, array.dtype.name)

    def data_ptr(self) -> int:
        """Address of the first element."""
        return int(self.array.ctypes.data)


def _as_argument(value: Any) -> Any:
    return _Pointer(value) if isinstance(value, np.ndarray) else value


def _jit_function(kernel: Any) -> Any:
    """Unwrap autotuners and heuristics down to the JITFunction."""
    while not hasattr(kernel, "_pack_args"):
        kernel = kernel.fn
    return kernel


def compile_for(
    kernel: Any, args: Sequence[Any], kwargs: Mapping[str, Any], target: int = 89, **options: Any
) -> tuple[Any, dict[str, Any], list[Any]]:
    """Compile a JITFunction for sm_<target>, specialised as a launch with these arguments would.

    Returns (CompiledKernel, arguments by name, arguments in the order of the PTX parameters).
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    function = _jit_function(kernel)
    gpu = GPUTarget("cuda", target, 32)
    backend = make_backend(gpu)
    bind = create_function_from_signature(function.signature, function.params, backend)
    given = {**{name: _as_argument(value) for name, value in kwargs.items()}, **options}
    given.setdefault("debug", function.debug or False)
    bound, specialisation, launch_options = bind(*[_as_argument(value) for value in args], **given)
    parsed, signature, constexprs, attributes = function._pack_args(
        backend, given, bound, specialisation, launch_options
    )
    source = ASTSource(function, signature, constexprs, attributes)
    compiled = triton.compile(source, target=gpu, options=parsed.__dict__)
    live: list[Any] = []
    for type_, value in zip(signature.values(), bound.values(), strict=True):
        _flatten(type_, value, live)
    return compiled, bound, live


def _flatten(type_: Any, value: Any, into: list[Any]) -> None:
    """Append what is left of an argument at run time; tuples are passed element by element."""
    if isinstance(type_, tuple | list):
        for element_type, element in zip(type_, value, strict=True):
            _flatten(element_type, element, into)
    elif type_ != "constexpr":
        into.append(value.array if isinstance(value, _Pointer) else value)


def launch(
    kernel: Any,
    grid: Any,
    *args: Any,
    target: int = 89,
    num_warps: int = 4,
    num_stages: int = 3,
    emu: Mapping[str, Any] | None = None,
    edit: Edit | None = None,
    **kwargs: Any,
) -> Counters:
    """kernel[grid](*args, **kwargs) on the emulator, in place on CPU tensors or numpy arrays.

    Args:
        kernel: a JITFunction, also below an autotuner or heuristics.
        grid: as for a launch: an int, a tuple, or a function of the arguments by name.
        target: compute capability: 80, 86, 89.
        emu: options of `run`, such as {"racecheck": True}.
        edit: applied to the PTX text before it runs.
    """
    compiled, bound, live = compile_for(
        kernel, args, kwargs, target, num_warps=num_warps, num_stages=num_stages
    )
    return run(compiled, grid(bound) if callable(grid) else grid, live, edit=edit, **(emu or {}))


def _first(configs: list[Any]) -> Any:
    return configs[0]


Log = list[tuple[str, Any]]


@contextmanager
def patched(
    target: int = 89,
    log: Log | None = None,
    compile_only: bool = False,
    pick: Callable[[list[Any]], Any] = _first,
    *,
    batch: int | None = None,
    counters: bool = True,
    racecheck: bool = False,
    extra: Iterable[Any] = (),
    max_steps: int | None = None,
    edit: Edit | None = None,
) -> Iterator[Log | None]:
    """Within this context every kernel[grid](...) on CPU tensors runs on the emulator.

    So unmodified host code can be called. Not for threads: Triton's classes are patched.

    Args:
        target: compute capability: 80, 86, 89.
        log: gets (kernel name, Counters) of each launch, or (kernel name, CompiledKernel).
        compile_only: compile, but run nothing.
        pick: chooses the configuration of an autotuned kernel from those that are left after pruning.
        batch, counters, racecheck, extra, max_steps, edit: as for `run`, for each launch.
    """
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    further = tuple(extra)

    def run_function(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
        for hook in self.pre_run_hooks:
            hook(*args, **kwargs)
        compiled, bound, live = compile_for(self, args, kwargs, target)
        if warmup:
            return compiled
        result: Any = compiled
        if not compile_only:
            result = run(
                compiled,
                grid(bound) if callable(grid) else grid,
                live,
                batch=batch,
                counters=counters,
                racecheck=racecheck,
                extra=further,
                max_steps=max_steps,
                edit=edit,
            )
        if log is not None:
            log.append((self.__name__, result))
        return compiled

    def run_tuned(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        config = pick(self.prune_configs(kwargs))
        options = config.all_kwargs()
        if config.pre_hook is not None:
            config.pre_hook({**self.nargs, **kwargs, **options})
        result = self.fn.run(*args, **kwargs, **options)
        self.nargs = None
        return result

    before = JITFunction.run, Autotuner.run
    JITFunction.run, Autotuner.run = run_function, run_tuned
    try:
        yield log
    finally:
        JITFunction.run, Autotuner.run = before
