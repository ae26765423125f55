"""Compiling a kernel for a GPU that is not there, as a launch on it would compile it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qtrain.kernels.specimens import Specimen

REMEDY = 'triton is not installed: pip install "triton>=3.6,<3.10"'


class NoTriton(Exception):
    """Nothing can be compiled here; the message is one line with the remedy."""


class NotCompiled(Exception):
    """The compiler refuses a kernel; the message names it and the architecture."""


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
        NotCompiled: the compiler or ptxas refuses the kernel.
        ValueError: signature, constexprs, alignment or options don't fit the kernel.
    """
    require_triton()
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, CompilationError
    from triton.runtime.errors import PTXASError

    signature = _signature(specimen)
    attributes = {
        (position,): [["tt.divisibility", 16]]
        for position, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in specimen.aligned
    }
    source = ASTSource(specimen.kernel, signature, dict(specimen.constexprs), attributes)
    target = GPUTarget("cuda", arch, 32)
    try:
        compiled = triton.compile(source, target=target, options=compile_options(specimen))
    except (CompilationError, PTXASError, RuntimeError) as error:
        raise NotCompiled(f"{specimen.name}: sm_{arch}: {error}") from error
    live = [(name, kind) for name, kind in signature.items() if kind != "constexpr"]
    return Compiled(
        ptx=compiled.asm["ptx"],
        cubin=compiled.asm["cubin"],
        shared_bytes=compiled.metadata.shared,
        pointers=tuple(name if kind.startswith("*") else None for name, kind in live),
    )


def compile_options(specimen: Specimen) -> dict[str, Any]:
    """Every option that a launch of this specimen passes.

    Whether a multiplication and an addition may become one fma is always said: Triton's default comes from
    the environment, and is going to change.
    """
    chosen = {"num_warps": specimen.num_warps, "num_stages": specimen.num_stages, **specimen.options}
    chosen.setdefault("enable_fp_fusion", True)
    return chosen


def _signature(specimen: Specimen) -> dict[str, str]:
    """Type of every argument in the kernel's order, checked: Triton ignores options that it doesn't know,
    and compiles nonsense of a wrong signature."""
    from triton.backends.nvidia.compiler import CUDAOptions
    from triton.runtime.jit import JITFunction

    kernel, name = specimen.kernel, specimen.name
    if not isinstance(kernel, JITFunction):
        raise ValueError(
            f"{name}: kernel is a {type(kernel).__name__}, needs a JITFunction "
            "(is TRITON_INTERPRET set, or is it wrapped by an autotuner?)"
        )
    given = {**specimen.signature, **dict.fromkeys(specimen.constexprs, "constexpr")}
    wanted = set(kernel.arg_names)
    if given.keys() != wanted:
        missing, unknown = sorted(wanted - given.keys()), sorted(given.keys() - wanted)
        raise ValueError(f"{name}: signature and constexprs: missing {missing}, unknown {unknown}")
    constants = [argument for argument, kind in given.items() if kind == "constexpr"]
    _within(f"{name}: signature: constexpr", constants, specimen.constexprs)
    pointers = [argument for argument, kind in given.items() if kind.startswith("*")]
    specialized = [param.name for param in kernel.params if _sees_alignment(param)]
    _within(f"{name}: aligned", specimen.aligned, set(specialized) & specimen.signature.keys())
    _within(f"{name}: hot", specimen.hot, pointers)
    _within(f"{name}: options", specimen.options, CUDAOptions.__dataclass_fields__)
    return {argument: given[argument] for argument in kernel.arg_names}


def _sees_alignment(param: Any) -> bool:
    """Whether a launch looks at the argument's divisibility at all."""
    return not (param.is_constexpr or param.do_not_specialize or param.do_not_specialize_on_alignment)


def _within(what: str, given: Iterable[str], wanted: Iterable[str]) -> None:
    if unknown := sorted(set(given) - set(wanted)):
        raise ValueError(f"{what}: {unknown} is not among {sorted(wanted)}")
