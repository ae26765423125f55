"""Compiling a kernel for a GPU that is not there, as a launch on it would compile it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qtrain.kernels.specimens import Specimen

REMEDY = 'triton is not installed: pip install "triton>=3.6,<3.10"'


class NoTriton(Exception):
    """Nothing can be compiled here; the message is one line with the remedy."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """What the compiler made: PTX as text, the cubin, and the shared memory that a launch asks for."""

    ptx: str
    cubin: bytes
    shared_bytes: int
    pointers: tuple[str | None, ...]
    """Names by the PTX parameters' order; None for what is no pointer of the kernel's."""


def require_triton() -> None:
    """Raises NoTriton where triton can't be imported."""
    try:
        import triton  # noqa: F401
    except ImportError:
        raise NoTriton(REMEDY) from None


def compile_specimen(specimen: Specimen, arch: int) -> Compiled:
    """Compile for compute capability `arch` (80, 86, 89, 90, 120, ...) without a GPU.

    Pointers and the arguments in `specimen.aligned` are divisible by 16, as torch's allocations and the
    usual strides are; without that the compiler emits 2-byte accesses. Triton's cache on disk is used.

    Raises:
        NoTriton: triton is missing.
        ValueError: signature, constexprs, alignment or options don't fit the kernel.
    """
    require_triton()
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    _check(specimen)
    arguments = list(specimen.kernel.arg_names)
    signature = {name: specimen.signature[name] for name in arguments}
    attributes = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(arguments)
        if signature[name].startswith("*") or name in specimen.aligned
    }
    source = ASTSource(specimen.kernel, signature, dict(specimen.constexprs), attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=compile_options(specimen))
    live = [name for name in arguments if signature[name] != "constexpr"]
    return Compiled(
        ptx=compiled.asm["ptx"],
        cubin=compiled.asm["cubin"],
        shared_bytes=compiled.metadata.shared,
        pointers=tuple(name if signature[name].startswith("*") else None for name in live),
    )


def compile_options(specimen: Specimen) -> dict[str, Any]:
    """Every option that a launch of this specimen passes.

    Whether a multiplication and an addition may become one fma is always said: Triton's default comes from
    the environment, and is going to change.
    """
    chosen = {"num_warps": specimen.num_warps, "num_stages": specimen.num_stages, **specimen.options}
    chosen.setdefault("enable_fp_fusion", True)
    return chosen


def _check(specimen: Specimen) -> None:
    """Triton ignores options that it doesn't know, and compiles nonsense of a wrong signature."""
    from triton.backends.nvidia.compiler import CUDAOptions
    from triton.runtime.jit import JITFunction

    kernel, name = specimen.kernel, specimen.name
    if not isinstance(kernel, JITFunction):
        raise ValueError(
            f"{name}: kernel is a {type(kernel).__name__}, needs a JITFunction "
            "(is TRITON_INTERPRET set, or is it wrapped by an autotuner?)"
        )
    arguments = set(kernel.arg_names)
    _same(f"{name}: signature", set(specimen.signature), arguments)
    constants = {argument for argument, kind in specimen.signature.items() if kind == "constexpr"}
    _same(f"{name}: constexprs", set(specimen.constexprs), constants)
    _within(f"{name}: aligned", specimen.aligned, arguments - constants)
    _within(f"{name}: hot", specimen.hot, _pointers(specimen.signature))
    _within(f"{name}: options", specimen.options, CUDAOptions.__dataclass_fields__)


def _pointers(signature: Mapping[str, str]) -> set[str]:
    return {argument for argument, kind in signature.items() if kind.startswith("*")}


def _same(what: str, given: set[str], wanted: set[str]) -> None:
    if given != wanted:
        raise ValueError(f"{what}: missing {sorted(wanted - given)}, unknown {sorted(given - wanted)}")


def _within(what: str, given: Any, wanted: Any) -> None:
    if unknown := sorted(set(given) - set(wanted)):
        raise ValueError(f"{what}: unknown {unknown}, there is {sorted(wanted)}")
