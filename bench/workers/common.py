"""What the workers share: the job they are given, the steps they time, the file they leave.

Standard library only at import, and `transformers` (which every variant has) where a trainer is hooked.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..measure import Cost, PeakMemory
from ..workload import Workload, load_rows
from .installed import versions

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "bitsandbytes",
    "trl",
    "unsloth",
    "unsloth_zoo",
    "datasets",
)


@dataclass(frozen=True, slots=True)
class Job:
    """One run of one variant."""

    folder: Path  # of the workload
    output: Path  # the JSON file to leave
    scratch: Path  # an empty folder of this run's own
    task: str  # dpo, sft, sft-answers
    dtype: str  # bf16 or fp32
    options: dict[str, Any]
    steps: int  # timed ones; one warm-up step comes before
    work: Workload

    @property
    def total_steps(self) -> int:
        return self.steps + 1

    @property
    def rows(self) -> list[dict[str, list[int]]]:
        return load_rows(self.folder)


@dataclass(slots=True)
class Recorder:
    """Gathers the measurements of a run, in the order: model loaded, [reference], steps, finish."""

    job: Job
    memory: PeakMemory | None = None
    reference: Cost | None = None
    steps: list[Cost] = field(default_factory=list)
    logs: list[dict[str, float]] = field(default_factory=list)

    def model_loaded(self, model: Any) -> None:
        """Everything resident from here on is added by training.

        Every weight is read once first: pages of a memory-mapped file count only when touched.
        """
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.detach().reshape(-1)[::64].clone()
        self.memory = PeakMemory()

    def finish(self, settings: dict[str, Any]) -> None:
        """Write the result.

        Raises:
            RuntimeError: the steps that were timed are not those that were asked for.
        """
        if self.memory is None or len(self.steps) != self.job.total_steps:
            raise RuntimeError(f"{len(self.steps)} steps were timed, {self.job.total_steps} were asked for")
        self.memory.close()
        result = {
            "steps": [asdict(step) for step in self.steps],
            "reference": None if self.reference is None else asdict(self.reference),
            "logs": self.logs,
            "baseline_bytes": self.memory.baseline,
            "peak_bytes": self.memory.peak(),
            "memory_method": self.memory.method,
            "settings": settings,
            "versions": versions(PACKAGES),
        }
        partial = self.job.output.with_suffix(".partial")
        partial.write_text(json.dumps(result))
        partial.rename(self.job.output)


def step_callback(recorder: Recorder) -> Any:
    """A TrainerCallback that times each optimizer step and keeps what the trainer logs."""
    from transformers import TrainerCallback

    class StepTimer(TrainerCallback):
        def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
            self.cpu, self.wall = time.process_time(), time.perf_counter()

        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            recorder.steps.append(Cost(time.process_time() - self.cpu, time.perf_counter() - self.wall))

        def on_log(
            self, _args: Any, _state: Any, _control: Any, logs: dict[str, Any], **_kwargs: Any
        ) -> None:
            if "loss" in logs:
                recorder.logs.append({name: float(value) for name, value in logs.items()})

    return StepTimer()


def torch_dtype(name: str) -> Any:
    """bf16 or fp32 as a torch dtype."""
    import torch

    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def keep_nf4_layout(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in place on CPUs with avx512_bf16.

    A forward in eval mode (a reference pass) would leave a layout without a backward, after which
    training crashes or learns nothing. Done for every variant, or the peers could not be timed.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def quantization(job: Job) -> Any:
    """NF4 with double quantisation, matmuls in the job's dtype."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch_dtype(job.dtype),
    )


def trainer_arguments(job: Job) -> dict[str, Any]:
    """The arguments of a `transformers.TrainingArguments` that every variant gets alike."""
    return {
        "output_dir": str(job.scratch / "out"),
        "per_device_train_batch_size": job.work.rows,
        "max_steps": job.total_steps,
        "learning_rate": job.work.learning_rate,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "seed": job.work.seed,
        "use_cpu": True,
        "disable_tqdm": True,
    }


def sft_rows(job: Job, task: str | None = None) -> list[dict[str, list[int]]]:
    """Prompt + chosen answer with labels on all tokens (`sft`) or on the answer only (`sft-answers`)."""
    rows = []
    for row in job.rows:
        ids = row["prompt_ids"] + row["chosen_ids"]
        hidden = len(row["prompt_ids"]) if (task or job.task) == "sft-answers" else 0
        rows.append({"input_ids": ids, "labels": [-100] * hidden + ids[hidden:]})
    return rows


def trainer_settings(trainer: Any) -> dict[str, Any]:
    """What was really trained with, read back from a `transformers.Trainer` after the run."""
    from torch import nn

    learned = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    dropouts = [module.p for module in trainer.model.modules() if isinstance(module, nn.Dropout)]
    return {
        "adapter_dtype": str(learned[0].dtype).removeprefix("torch."),
        "adapter_parameters": sum(parameter.numel() for parameter in learned),
        "bf16_autocast": bool(trainer.args.bf16),
        "gradient_checkpointing": any(
            getattr(m, "gradient_checkpointing", False) for m in trainer.model.modules()
        ),
        "dropout": max(dropouts, default=0.0),
        "optimizer": type(trainer.optimizer).__name__,
    }


def read_job() -> Job:
    """The job file named by the only argument."""
    raw: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    for name in ("folder", "output", "scratch"):
        raw[name] = Path(raw[name])
    work = raw.pop("work")
    work["target_modules"] = tuple(work["target_modules"])
    return Job(**raw, work=Workload(**work))
