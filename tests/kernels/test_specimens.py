"""The list of what is proved is the list of what is launched."""

from __future__ import annotations

import ast
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="specimens are Triton kernels")

from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from qtrain.bench.aot import compile_options
from qtrain.bench.cards_emulated import example_of
from qtrain.bench.examples import Shape
from qtrain.kernels import force_backend, linear_logprob, nf4_dequantize
from qtrain.kernels.specimens import Specimen, all_specimens
from tests.kernels.lora_cases import make_case, nf4_weight, run

ROOM = Path(__file__).parents[2] / "kernels"
SPECIMENS = all_specimens()
# constants that are a kernel's tile
TILE = {"BM", "BN", "BK", "BR", "BC", "BH", "BV", "BT", "GROUP", "WORDS"}
ALIGNED = " divisible by 16"


@dataclass(frozen=True)
class Launch:
    """What a launch is compiled for: `arguments` by type and divisibility, or by value where constant."""

    kernel: str
    arguments: Mapping[str, Any]
    options: Mapping[str, Any]

    def configuration(self) -> tuple[str, frozenset[tuple[str, Any]]]:
        """Tile and compile options."""
        tile = {name: value for name, value in self.arguments.items() if name in TILE}
        return self.kernel, frozenset((tile | dict(self.options)).items())

    def each(self) -> set[tuple[str, str, str]]:
        """Its arguments one by one; of the ranks, which are many, only whether there is one."""
        shown = {name: value > 0 if name == "RANK" else value for name, value in self.arguments.items()}
        return {(self.kernel, name, str(value)) for name, value in shown.items()}


def listed(specimen: Specimen) -> Launch:
    types = {
        name: kind + (ALIGNED if kind.startswith("*") or name in specimen.aligned else "")
        for name, kind in specimen.signature.items()
    }
    return Launch(specimen.kernel.__name__, types | dict(specimen.constexprs), compile_options(specimen))


def launched(kernel: Any, arguments: Mapping[str, Any]) -> Launch:
    """As Triton specialises a call for sm_89."""
    backend = make_backend(GPUTarget("cuda", 89, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, options = bind(**arguments)
    seen = {
        param.name: bound[param.name]
        if kind == "constexpr"
        else kind + (ALIGNED if divisible and "D" in divisible else "")
        for param, (kind, divisible) in zip(kernel.params, specialisation, strict=True)
    }
    defaults = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
    return Launch(kernel.__name__, seen, defaults | options)


def lora() -> Iterator[Callable[[], object]]:
    """Layers of one and of three, with tiles that fill a GPU and that don't, of several ranks."""
    few: list[tuple[int, list[int], list[int]]] = [(70, [192], [rank]) for rank in (8, 16, 32, 64, 128)]
    many = [(2048, [1024], ranks) for _, _, ranks in few]
    groups = [(300, [128, 64, 64], [64, 64, 64]), (2048, [64] * 3, [64] * 3), (2048, [64] * 3, [32] * 3)]
    dtypes = (torch.bfloat16, torch.float16)
    for base, dtype, p in itertools.product(("nf4 nested", "nf4", "16-bit"), dtypes, (0.0, 0.1)):
        for rows, columns, ranks in (*few, *many, *groups):
            # the bias matters to the forward alone, dropout to all the others
            case = make_case(rows, columns, 64, ranks, base=base, dtype=dtype, dropout_p=p, bias=p > 0)
            yield partial(run, case)


def dequantization() -> Iterator[Callable[[], object]]:
    for nested, dtype in itertools.product((True, False), (torch.bfloat16, torch.float16, torch.float32)):
        weight = nf4_weight(64, 128, nested=nested, generator=torch.Generator().manual_seed(0))
        yield partial(nf4_dequantize, weight, dtype)


def logprob() -> Iterator[Callable[[], object]]:
    """Heads that learn and that don't, hidden states of the head's dtype or float32, biases and caps."""
    for dtype, learns, hidden, size in itertools.product(
        (torch.bfloat16, torch.float16), (True, False), (None, torch.float32), (64, 256)
    ):
        h = torch.zeros(40, size, dtype=hidden or dtype, requires_grad=True)
        weight = torch.zeros(600, size, dtype=dtype, requires_grad=learns)
        for bias, cap in ((None, None), (torch.zeros(600, dtype=dtype), 30.0)):
            yield partial(_logprob, h, weight, bias, cap)


def _logprob(h: Tensor, weight: Tensor, bias: Tensor | None, cap: float | None) -> None:
    """Forward and backward, and the forward alone."""
    labels = torch.zeros(h.shape[0], dtype=torch.long)
    logp = linear_logprob(h, weight, labels, bias=bias, softcap=cap)
    assert isinstance(logp, Tensor)
    torch.autograd.grad(logp.sum(), [one for one in (h, weight) if one.requires_grad])
    with torch.no_grad():
        linear_logprob(h, weight, labels, bias=bias, softcap=cap)


@pytest.fixture(scope="module")
def launches() -> dict[str, list[Launch]]:
    """What the ops launch over a spread of arguments, by op; nothing is executed."""
    found: dict[str, list[Launch]] = {}
    with pytest.MonkeyPatch.context() as patch, force_backend("triton"):
        for op, calls in (("lora", lora()), ("dequantization", dequantization()), ("logprob", logprob())):
            seen: list[Launch] = found.setdefault(op, [])

            def note(kernel: Any, seen: list[Launch] = seen, **arguments: Any) -> None:
                del arguments["grid"], arguments["warmup"]
                launch = launched(kernel, arguments)
                if launch not in seen:
                    seen.append(launch)

            patch.setattr(JITFunction, "run", note)
            for call in calls:
                call()
    return found


@pytest.mark.parametrize("op", ["lora", "dequantization", "logprob"])
def test_every_launch_is_listed(launches: dict[str, list[Launch]], op: str) -> None:
    """Its tile and options are those of a specimen, and each argument is as in a specimen.

    Not every combination of arguments is one: types, bias, dropout, rank and base multiply to hundreds.
    """
    ours = [listed(one) for one in SPECIMENS]
    configurations = {one.configuration() for one in ours}
    assert {one.configuration() for one in launches[op]} - configurations == set()
    known = set().union(*(one.each() for one in ours))
    missing = set().union(*(one.each() for one in launches[op])) - known
    assert not missing, "\n".join(map(str, sorted(missing)))


def test_every_specimen_is_launched(launches: dict[str, list[Launch]]) -> None:
    """A specimen that no launch corresponds to proves nothing of what users run."""
    seen = [launch for of_op in launches.values() for launch in of_op]
    never = [one.name for one in SPECIMENS if listed(one) not in seen]
    assert never == [], "\n".join(never)


def test_every_specimen_has_an_example() -> None:
    """The emulator runs those, for the cards and for the tests of the compiled code."""
    shape = Shape(rows=3, outputs=64, inner=64)
    assert [one.name for one in SPECIMENS if example_of(one, shape) is None] == []


def test_names_are_unique() -> None:
    assert [name for name, count in Counter(one.name for one in SPECIMENS).items() if count > 1] == []


def test_every_kernel_that_is_launched_has_a_specimen() -> None:
    """A launch is `name[grid](...)`."""
    written = {
        call.func.value.id
        for path in ROOM.glob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Subscript)
        and isinstance(call.func.value, ast.Name)
    }
    assert written == {one.kernel.__name__ for one in SPECIMENS}


def test_fp_fusion_is_decided_by_every_launch() -> None:
    """Its default comes from an environment variable, and is going to change."""
    assert [one.name for one in SPECIMENS if "enable_fp_fusion" not in one.options] == []
