"""One run of qtrain's own trainers, put together as `qtrain run` does it.

Options: `checkpointing` (gradient checkpointing) and, for DPO, `share` (the prompt of a pair computed
once) and `dropout` (False switches it off, as the peers' DPO has it by default). Otherwise, as in
`qtrain run`, the adapter is fp32 and the dropout asked for is applied.
"""

from __future__ import annotations

from typing import Any

from qtrain.data.rows import Source
from qtrain.data.template import EncodedExample, EncodedPair
from qtrain.model import load
from qtrain.recipe.schema import Recipe
from qtrain.runs.rundir import RunDir
from qtrain.training import prepare
from qtrain.training.dpo import DpoTrainer
from qtrain.training.reference import reference_logps, score_pairs
from qtrain.training.sft import SftTrainer

from ..measure import Stopwatch
from .common import Job, Recorder, read_job, sft_rows, step_callback, trainer_settings

NEVER = 10**9


def main() -> None:
    """Load, train, write the result."""
    job = read_job()
    recorder = Recorder(job)
    recipe = _recipe(job)
    run = RunDir(job.scratch / "run")
    run.path.mkdir()
    prepared = _prepare(recipe, recorder)
    rows = _rows(job)
    arguments: dict[str, Any] = {
        "run": run,
        "model": prepared.model,
        "args": prepare.training_arguments(recipe, run, prepared.base),
        "train_rows": rows,
        "eval_rows": None,
        "collate": prepared.collate,
        "keep_checkpoints": 1,
        "callbacks": [step_callback(recorder)],
        "say": _ignore,
    }
    if job.task == "dpo":
        with Stopwatch() as watch:
            score = score_pairs(prepared.model, prepared.collate, rows, prepared.base.compute.device)
            reference = reference_logps(
                score, len(rows), run.reference, key="bench", batch_size=job.work.rows
            )
        recorder.reference = watch.cost
        trainer: Any = DpoTrainer(dpo=recipe.dpo, reference=reference, **arguments)
    else:
        trainer = SftTrainer(**arguments)
    trainer.train()
    recorder.finish(
        trainer_settings(trainer) | {"packed": prepared.packed, "shared_prompts": prepared.shared_prompts}
    )


def _prepare(recipe: Recipe, recorder: Recorder) -> prepare.Prepared:
    """`prepare_model` with the memory baseline taken where the peers' is: base loaded, no adapter yet."""

    def load_and_note(*args: Any, **kwargs: Any) -> Any:
        base = load.load_base(*args, **kwargs)
        recorder.model_loaded(base.model)
        return base

    vars(prepare)["load_base"] = load_and_note
    try:
        return prepare.prepare_model(recipe, _ignore)
    finally:
        vars(prepare)["load_base"] = load.load_base


def _ignore(_line: str) -> None:
    """Choices that the trainer announces are in the result's settings."""


def _recipe(job: Job) -> Recipe:
    work = job.work
    return Recipe.model_validate(
        {
            "model": {"name": str(job.folder), "quantization": "nf4", "compute_dtype": job.dtype},
            "adapter": {
                "r": work.lora_r,
                "alpha": work.lora_alpha,
                "dropout": work.lora_dropout if job.options.get("dropout", True) else 0.0,
                "target_modules": list(work.target_modules),
            },
            "dpo": {"beta": work.beta, "share_prompts": job.options.get("share", True)},
            "training": {
                "method": "dpo" if job.task == "dpo" else "sft",
                "max_steps": job.total_steps,
                "batch_size": work.rows,
                "gradient_accumulation": 1,
                "learning_rate": work.learning_rate,
                "schedule": "constant",
                "warmup_ratio": 0.0,
                "gradient_checkpointing": job.options["checkpointing"],
                "seed": work.seed,
                "save_every": NEVER,
            },
            "out": job.scratch / "run",
        }
    )


def _rows(job: Job) -> list[Any]:
    if job.task == "dpo":
        return [EncodedPair(**row, source=_source(number), cut=0) for number, row in enumerate(job.rows)]
    return [
        EncodedExample(
            input_ids=row["input_ids"],
            supervised=[label != -100 for label in row["labels"]],
            source=_source(number),
            cut=0,
        )
        for number, row in enumerate(sft_rows(job))
    ]


def _source(number: int) -> Source:
    return Source("benchmark", number + 1)


if __name__ == "__main__":
    main()
