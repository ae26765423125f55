"""What a result file says of itself: provenance and protocol, checked."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from .result_checks import Positive

Gpus = list[dict[str, Any]]


class _Kept(BaseModel):
    """What nobody asks for is kept: the page shows it."""

    model_config = ConfigDict(extra="allow")


class Machine(_Kept):
    """As `provenance.machine` writes it, and a benchmark's additions."""

    cpu: str | None = None
    cpu_features: list[str] = Field(default_factory=list)
    cores: int | None = None
    threads: int | None = None
    memory: str | None = None
    load: list[float] | None = None
    gpus: Gpus = Field(default_factory=list)
    gpu_clocks_before: Gpus = Field(default_factory=list)
    gpu_clocks_after: Gpus = Field(default_factory=list)


class SourceState(BaseModel):
    """Of the checkout."""

    commit: str | None = None
    dirty: bool | None = None


class Provenance(BaseModel):
    """As `provenance.provenance` writes it; what else is there is passed over."""

    time: str | None = None
    command: list[str] = Field(default_factory=list)
    source: SourceState = Field(default_factory=SourceState)
    versions: dict[str, str | None] = Field(default_factory=dict)
    machine: Machine = Field(default_factory=Machine)


class CardRates(BaseModel):
    """As `kernel_roofline.Rates`."""

    card: str
    half: Positive
    single: Positive
    memory: Positive


class Protocol(_Kept):
    """How it was measured."""

    device: str | None = None
    clock: str | None = None
    cold: bool | None = None
    threads: int | None = None
    rates: CardRates | None = None
    setting: dict[str, Any] = Field(default_factory=dict)
