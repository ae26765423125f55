"""What a kernel did when the emulator ran its compiled code, and how far that is from the roofline.

Counts are of one launch at a small shape. Modelled is the time that each resource of an RTX 4090 would take,
with the work spread over all multiprocessors as it is at the sizes of real layers: at least the longest of
them if all overlap, their sum if nothing does. Nothing was timed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from .examples import Example, Shape
from .ptx import RTX4090, Counters, estimate

if TYPE_CHECKING:
    from qtrain.kernels.specimens import Specimen

# Large enough that a GEMM has several tiles in each direction and a pipeline in its steady state
SHAPE = Shape(rows=512, outputs=1024, inner=1024)


@dataclass(frozen=True, slots=True)
class Emulated:
    """One launch."""

    shape: dict[str, int]
    ideal_bytes: int
    """Every input read once, every output written once."""
    touched_bytes: int
    """The 32-byte sectors of memory that were read or written."""
    moved_bytes: int
    """The sectors that all warps asked for together: what L2 and L1 serve."""
    shared_wavefronts: int
    conflict_free_wavefronts: int
    """What shared memory took, and would without bank conflicts."""
    flops: int
    times_us: dict[str, float]
    """Modelled, by resource."""
    bound: str
    """The resource that takes longest."""
    overlapped_us: float
    """Its time."""
    serial_us: float
    """Issue slots, tensor cores, shared memory and DRAM one after the other."""
    roofline_us: float
    """The longer of ideal bytes at full bandwidth and tensor core work at full rate."""

    @property
    def moved(self) -> float:
        """Times the ideal bytes."""
        return self.moved_bytes / self.ideal_bytes

    @property
    def touched(self) -> float:
        """Times the ideal bytes."""
        return self.touched_bytes / self.ideal_bytes

    @property
    def conflicts(self) -> float:
        """Wavefronts of shared memory to one without conflicts; 1 where none is used."""
        return (
            self.shared_wavefronts / self.conflict_free_wavefronts if self.conflict_free_wavefronts else 1.0
        )

    @property
    def of_roofline(self) -> tuple[float, float]:
        """Share of the roofline: if nothing overlaps, and if all does."""
        return self.roofline_us / self.serial_us, self.roofline_us / self.overlapped_us

    def as_dict(self) -> dict[str, Any]:
        """For JSON, the ratios included."""
        ratios = {"moved": self.moved, "touched": self.touched, "conflicts": self.conflicts}
        return asdict(self) | ratios | {"of_roofline": self.of_roofline}


def emulate(specimen: Specimen, shape: Shape = SHAPE) -> Emulated | None:
    """Run a specimen's example as compiled for sm_89; None where there is none."""
    example = example_of(specimen, shape)
    if example is None:
        return None
    return summary(example.emulate(), example.ideal_bytes, asdict(shape))


def example_of(specimen: Specimen, shape: Shape) -> Example | None:
    """Of whichever file knows the specimen's kernel."""
    from . import logprob_examples, lora_examples

    for of_op in (lora_examples, logprob_examples):
        with suppress(KeyError):
            return of_op.example(specimen, shape)
    return None


def summary(counters: Counters, ideal_bytes: int, shape: dict[str, int]) -> Emulated:
    """Of one launch's counters."""
    whole = filling(counters, RTX4090.sms)
    model = estimate(whole)
    times = {name: time / RTX4090.sms for name, time in model.times.items()}
    memory = ideal_bytes / RTX4090.dram * 1e6
    return Emulated(
        shape=shape,
        ideal_bytes=ideal_bytes,
        touched_bytes=counters.unique_read + counters.unique_write,
        moved_bytes=32 * sum(kind["sectors"] for kind in counters.gmem.values()),
        shared_wavefronts=sum(kind["wavefronts"] for kind in counters.smem.values()),
        conflict_free_wavefronts=sum(kind["ideal"] for kind in counters.smem.values()),
        flops=counters.flops,
        times_us={name: time for name, time in times.items() if time},
        bound=model.bound,
        overlapped_us=times[model.bound],
        serial_us=sum(times[name] for name in ("issue", "tensor", "shared", "DRAM")),
        roofline_us=max(memory, times["tensor"]),
    )


def filling(counters: Counters, times: int) -> Counters:
    """Those of so many launches at once: a multiple of the multiprocessors' number leaves none idle."""

    def scaled(counts: Counter[Any]) -> Counter[Any]:
        return Counter({name: count * times for name, count in counts.items()})

    return replace(
        counters,
        ctas=counters.ctas * times,
        instr=scaled(counters.instr),
        mma_flops=scaled(counters.mma_flops),
        gmem=_each(counters.gmem, scaled),
        smem=_each(counters.smem, scaled),
        unique_read=counters.unique_read * times,
        unique_write=counters.unique_write * times,
        kernel=None,
    )


def _each(counts: Any, scaled: Callable[[Counter[Any]], Counter[Any]]) -> Any:
    return type(counts)(counts.default_factory, {kind: scaled(of_kind) for kind, of_kind in counts.items()})
