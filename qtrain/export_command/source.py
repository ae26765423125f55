"""What is exported: a finished run (its base and adapter), or a model as it is."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtrain.errors import UserError
from qtrain.evaluation.subject import Subject, find_subject
from qtrain.model.folder import base_on_disk
from qtrain.recipe.schema import DataSettings, ModelSettings
from qtrain.runs.manifest import base_hashes
from qtrain.runs.rundir import RunDir

if TYPE_CHECKING:
    import torch

    from qtrain.data.dataset import Method
    from qtrain.export.nf4_base import NF4Settings

TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class Source:
    """A run or a plain model, resolved to folders.

    Attributes:
        name: as the user gave it.
        base: folder of the 16-bit base.
        adapter: folder of the adapter; None for a plain model.
        run: None for a plain model.
        model, data, method: of the run; defaults for a plain model.
        files: SHA-256 of the base's files.
        notes: what a user should know of.
    """

    name: str
    base: Path
    adapter: Path | None
    run: RunDir | None
    model: ModelSettings
    data: DataSettings
    method: Method
    files: dict[str, str]
    notes: list[str] = field(default_factory=list)

    def out(self, kind: str) -> Path:
        """Where an export goes unless --out says otherwise: RUN/export/`kind`.

        Raises:
            UserError: a plain model has no such place.
        """
        if self.run is None:
            raise UserError(f"{self.name} is no run: name the folder to write with --out")
        return self.run.path / "export" / kind

    def check_apart(self, out: Path) -> None:
        """Refuse a folder to write that is, or holds, what is read: --force would replace it.

        Raises:
            UserError: names both.
        """
        place = out.resolve()
        for read in (self.base, self.adapter, None if self.run is None else self.run.path):
            if read is not None and (place == read.resolve() or place in read.resolve().parents):
                raise UserError(f"--out {out} would replace {read}, which is read; name another folder")

    @property
    def template(self) -> Path | None:
        """The chat template that the run rendered with, where it is not the tokenizer's own."""
        if self.adapter is None or self.data.chat_template is None:
            return None
        path = self.adapter / TEMPLATE
        return path if path.is_file() else None

    def compute_dtype(self) -> torch.dtype:
        """What the run multiplied in: recorded in its manifest, else what this machine would take."""
        import torch

        from qtrain.model.devices import choose_compute

        recorded = _manifest(self.run).get("choices", {}).get("compute_dtype", "")
        dtype = getattr(torch, str(recorded).partition(":")[0] or "none", None)
        return dtype if isinstance(dtype, torch.dtype) else choose_compute(self.model).dtype

    def nf4(self) -> NF4Settings | None:
        """How the run held its base in 4 bits; None for 16 bits."""
        from qtrain.export.nf4_base import NF4Settings

        if self.model.quantization != "nf4":
            return None
        return NF4Settings(self.model.double_quant, self.compute_dtype())


def find_source(name: str, adapter: Path | None = None) -> Source:
    """The run, model folder or hub name behind `name`; its base's files are hashed and compared.

    Args:
        adapter: a PEFT adapter's folder, for a plain model.

    Raises:
        UserError: nothing is there, the run is not finished, its adapter is damaged, or its base has changed.
    """
    subject = find_subject(name)
    if subject.run is not None and adapter is not None:
        raise UserError(f"--adapter is for a plain model; {name} is a run and has its own")
    base = base_on_disk(subject.model)
    files = base_hashes(str(base))
    found = Source(
        name,
        base,
        adapter if subject.run is None else subject.run.adapter,
        subject.run,
        subject.model,
        subject.data,
        "dpo" if subject.method == "dpo" else "sft",
        files,
    )
    _compare_base(found, subject)
    return found


def _compare_base(source: Source, subject: Subject) -> None:
    """The base has to be the one that the run recorded; what stands beside its weights may have changed."""
    if source.run is None:
        return
    recorded: dict[str, str] = _manifest(source.run).get("base", {}).get("files", {})
    if not recorded:
        source.notes.append(
            "the run's manifest records no hashes of its base: only names and shapes are compared"
        )
        return
    changed = sorted(
        name for name in {*recorded, *source.files} if recorded.get(name) != source.files.get(name)
    )
    weights = [name for name in changed if name.endswith(".safetensors") or name == "config.json"]
    if weights:
        raise UserError(
            f"{weights[0]} of {source.base} is not the file that {subject.name} was trained on "
            f"(SHA-256 differs); bring that base back, or merge by shapes alone: "
            f"qtrain export merge {source.base} --adapter {source.adapter}"
        )
    if changed:
        source.notes.append(f"changed in {source.base} since the training: {', '.join(changed)}")


def _manifest(run: RunDir | None) -> dict[str, Any]:
    if run is None or not run.manifest.is_file():
        return {}
    try:
        value = json.loads(run.manifest.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{run.manifest} can't be read: {error}; restore it or train the run again"
        ) from error
    return value if isinstance(value, dict) else {}
