"""The gate: a quantised folder, read back from its files, against the model that it was made of."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .agreement import ROWS, Agreement, agreement
from .checkpoint import EMBEDDING, HEAD
from .errors import ExportError, GateFailed
from .merged_weights import MergedWeights
from .quantized_checkpoint import QuantizedCheckpoint
from .streamed_model import Fetch, StreamedModel

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a checkpoint must keep to.

    Attributes:
        kl: mean KL(reference || quantised), nats, at most.
        ppl: perplexity over the reference's, at most.
        top1: share of positions with the same likeliest token, at least.
        stops: places where an answer ends and the end is the likeliest token: this share of the
            reference's, at least.
    """

    kl: float = 0.25
    ppl: float = 1.25
    top1: float = 0.0
    stops: float = 0.9


@dataclass(frozen=True, slots=True)
class Stops:
    """How often the end of an answer is the likeliest token where it belongs.

    Attributes:
        places: behind which an answer ends.
        p, q: of them, where it is the likeliest token, by the reference and by the quantised model.
    """

    places: int
    p: int
    q: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was measured, and the bounds that it fails.

    Attributes:
        agreement: P the reference, Q the quantised model.
        stops: None where no answer ends in any window.
        bounds: None where the gate is off.
    """

    agreement: Agreement
    stops: Stops | None
    bounds: Bounds | None

    @property
    def perplexity_ratio(self) -> float:
        """Of the quantised model to the reference."""
        return self.agreement.perplexity_q / self.agreement.perplexity_p

    @property
    def failures(self) -> list[str]:
        """The bounds that do not hold, each with both values."""
        bounds, found = self.bounds, self.agreement
        if bounds is None:
            return []
        failed = []
        if not found.kl <= bounds.kl:
            failed.append(f"KL {found.kl:.4g} is above {bounds.kl:g}")
        if not self.perplexity_ratio <= bounds.ppl:
            failed.append(
                f"perplexity is {self.perplexity_ratio:.4g} times the reference's, above {bounds.ppl:g}"
            )
        if not found.top1 >= bounds.top1:
            failed.append(f"top-1 agreement {found.top1:.4g} is below {bounds.top1:g}")
        if self.stops is not None and self.stops.q < bounds.stops * self.stops.p:
            failed.append(
                f"answers end at {self.stops.q} of {self.stops.places} places where the reference's end at "
                f"{self.stops.p}, below {bounds.stops:g} of them"
            )
        return failed

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            **self.agreement.as_dict(),
            "perplexity_ratio": self.perplexity_ratio,
            "stops": None if self.stops is None else asdict(self.stops),
            "bounds": "off" if self.bounds is None else asdict(self.bounds),
            "failures": self.failures,
            "passed": not self.failures,
            "arithmetic": "float32, weights dequantised from the written files",
        }


def parse_gate(text: str | None) -> Bounds | None:
    """`kl=0.1,ppl=1.05` over the defaults; `off` is no gate.

    Raises:
        ExportError: an unknown bound, or a value that is no positive number.
    """
    if text is None:
        return Bounds()
    if text.strip() == "off":
        return None
    names = [field.name for field in fields(Bounds)]
    given: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ExportError(f"--gate {text}: no bound '{name}', there are {', '.join(names)}, or off{hint}")
        try:
            given[name] = float(value)
        except ValueError:
            given[name] = -1.0
        if not 0 <= given[name] < float("inf"):
            raise ExportError(f"--gate {text}: {name} is '{value}', must be a number of 0 or more")
    return Bounds(**given)


def measure(
    reference: MergedWeights,
    folder: Path,
    windows: Sequence[Sequence[int]],
    *,
    ends: tuple[int, Sequence[Sequence[int]]] | None,
    bounds: Bounds | None,
    device: torch.device | str = "cpu",
    say: Say = lambda _: None,
) -> Verdict:
    """Compare a quantised folder's files with the weights that they were made of.

    Args:
        reference: the 16-bit weights.
        folder: as any reader would get it.
        windows: token ids, at least one.
        ends: the token that ends an answer, and of each window the places behind which one ends.
        device: where to compute, in float32.

    Raises:
        ExportError: the folder is damaged, or the reference has another vocabulary.
    """
    quantized = QuantizedCheckpoint.open(folder)
    quantized.check_complete()
    _check_vocabularies(reference, quantized)
    say("the reference")
    p = StreamedModel(reference.folder, remembering(reference.fetch, HEAD), device=device)
    p_states = p.hidden_states(windows)
    say("the quantised files")
    q = StreamedModel(folder, remembering(quantized.weight, HEAD), device=device)
    q_states = q.hidden_states(windows)
    say("their predictions")
    found = agreement(windows, (p_states, p.logits), (q_states, q.logits))
    stops = None if ends is None else _stops(ends, (p_states, p), (q_states, q))
    return Verdict(found, stops, bounds)


def _check_vocabularies(reference: MergedWeights, quantized: QuantizedCheckpoint) -> None:
    p, q = reference.checkpoint, quantized.checkpoint
    if p.specs[EMBEDDING].shape[0] != q.specs[EMBEDDING].shape[0]:
        raise ExportError(
            f"{p.folder} has {p.specs[EMBEDDING].shape[0]} tokens and {q.folder} "
            f"{q.specs[EMBEDDING].shape[0]}: it was not made of it; name the model that it was made of"
        )


def check_gate(verdict: Verdict, place: Path) -> None:
    """Raise where bounds do not hold.

    Args:
        place: where the checkpoint lies now.

    Raises:
        GateFailed: in a line, with the values and the bounds.
    """
    if verdict.failures:
        raise GateFailed(
            f"{place} is below the gate: {'; '.join(verdict.failures)}; more calibration (--calib), "
            "more bits or smaller groups bring it closer, --gate changes the bounds"
        )


def remembering(fetch: Fetch, name: str) -> Fetch:
    """`fetch` that keeps one tensor: the head is asked for again for every few positions."""
    kept: dict[str, Tensor] = {}

    def remember(wanted: str) -> Tensor:
        if wanted != name:
            return fetch(wanted)
        if name not in kept:
            kept[name] = fetch(name)
        return kept[name]

    return remember


def _stops(
    ends: tuple[int, Sequence[Sequence[int]]],
    p: tuple[Sequence[Tensor], StreamedModel],
    q: tuple[Sequence[Tensor], StreamedModel],
) -> Stops | None:
    """Count the places where an answer ends and a model would have said so."""
    stop_id, places = ends
    counts = []
    for states, model in (p, q):
        rows = [its[place] for its, chosen in zip(states, places, strict=False) for place in chosen]
        said = 0
        for first in range(0, len(rows), ROWS):
            said += int((model.logits(torch.stack(rows[first : first + ROWS])).argmax(-1) == stop_id).sum())
        counts.append((len(rows), said))
    (total, of_p), (_, of_q) = counts
    return Stops(total, of_p, of_q) if total else None
