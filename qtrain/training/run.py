"""One run from recipe to finished adapter."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from transformers import PrinterCallback

from qtrain.errors import QtrainError, UserError
from qtrain.model.kernels import LoraKernels
from qtrain.recipe.load import dump_recipe, load_recipe
from qtrain.recipe.schema import Recipe
from qtrain.runs.atomic import disk_errors, write_checksums, write_json, write_text
from qtrain.runs.manifest import adapter_hash, base_hashes, provenance
from qtrain.runs.rundir import RunDir, open_run

from . import checkpoint
from .callbacks import MetricsFile, PlainProgress, ProgressBar, StopOnSignal, TensorBoard
from .distributed import local_rank, main_process, requested, wrapping
from .dpo import DpoTrainer
from .prepare import (
    Data,
    Prepared,
    Say,
    check_request,
    prepare_data,
    prepare_model,
    training_arguments,
    use_checkpointing,
)
from .reference import reference_key, reference_logps, score_pairs
from .sft import SftTrainer
from .trainer import LogprobTrainer


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call of `train` ended."""

    run: RunDir
    state: str  # finished, stopped, already finished
    step: int
    figures: dict[str, Any]


def begin_run(recipe: Recipe) -> RunDir:
    """Make a new run directory with its resolved recipe.

    Raises:
        UserError: there is something at that place.
    """
    if recipe.out is None:
        raise ValueError("the recipe's out is not resolved")
    run = RunDir(recipe.out)
    if run.exists():
        state = run.status().get("state", "not started")
        raise UserError(f"{run.path} exists already ({state}); --resume goes on with it, --out names another")
    if run.path.is_dir() and any(run.path.iterdir()):
        raise UserError(f"{run.path} exists and is no run directory; give another --out")
    with disk_errors("the run directory", run.path):
        run.path.mkdir(parents=True, exist_ok=True)
        write_text(run.recipe, dump_recipe(recipe))
        run.set_status("running", step=0)
    return run


def stored_recipe(path: Path) -> Recipe:
    """The recipe of a run to be resumed."""
    return load_recipe(open_run(path).recipe, []).model_copy(update={"out": path})


def train(recipe: Recipe, *, resume: bool, console: Console) -> Outcome:
    """Do the run, or go on with it.

    Raises:
        UserError: a mistake in recipe, data or files.
        QtrainError: a NaN loss, a full disk.
    """
    say: Say = (
        (lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True))
        if main_process()
        else _silent
    )
    check_request(recipe)
    run = RunDir(recipe.out or Path())
    if resume:
        status = run.status()
        if status.get("state") == "finished":
            say(f"{run.path} is finished (step {status.get('step')}): nothing to do")
            return Outcome(run, "already finished", int(status.get("step", 0)), status)
    elif main_process():
        begin_run(recipe)
    say(f"run: {run.path}")
    data, prepared = _prepare(recipe, run, resume, say)
    with disk_errors("the run", run.path):
        trainer, stop = _make_trainer(recipe, run, data, prepared, console, say)
        _say_repeated_rows(trainer, len(data.train), say)
        start = checkpoint.latest_complete(run.checkpoints, say) if resume else None
        if resume:
            say(
                f"resuming from {start.name}"
                if start
                else "no checkpoint was written yet: starting from the first step"
            )
        _write_manifest(run, recipe, data, prepared, trainer)
        return _train(trainer, stop, run, start, prepared.kernels, say)


def _prepare(recipe: Recipe, run: RunDir, resume: bool, say: Say) -> tuple[Data, Prepared]:
    """Rows and model; a new run that a mistake in either stops leaves no directory behind."""
    try:
        data = prepare_data(recipe, run if main_process() else None)
        for line in data.train.report.lines():
            say(line)
        return data, prepare_model(recipe, say)
    except UserError:
        if not resume and main_process():
            shutil.rmtree(run.path)
        raise


def _say_repeated_rows(trainer: LogprobTrainer, rows: int, say: Say) -> None:
    """accelerate gives every process as many rows by repeating some of the first at the end of an epoch."""
    processes = trainer.accelerator.num_processes
    together = processes * trainer.args.per_device_train_batch_size
    if processes > 1 and rows % together:
        say(f"{rows} rows over {processes} processes: {-rows % together} are repeated at the end of an epoch")


def _silent(line: str) -> None:
    """Only the main process speaks."""


def _train(
    trainer: LogprobTrainer,
    stop: StopOnSignal,
    run: RunDir,
    start: Path | None,
    kernels: LoraKernels,
    say: Say,
) -> Outcome:
    main = main_process()
    step = checkpoint.checkpoint_step(start) if start else 0
    if main:
        run.set_status("running", step=step)
    try:
        with stop:
            trainer.train(resume_from_checkpoint=str(start) if start else None)
    except BaseException as error:
        if main:
            run.set_status(
                "failed", step=trainer.state.global_step, reason=str(error) or type(error).__name__
            )
        if isinstance(error, torch.OutOfMemoryError):
            raise QtrainError(
                f"out of memory on {trainer.args.device} at step {trainer.state.global_step + 1}; lower "
                "training.batch_size (and raise training.gradient_accumulation) or data.max_length, "
                "or set training.gradient_checkpointing=true"
            ) from error
        raise
    step = trainer.state.global_step
    if stop.received is not None and step < trainer.state.max_steps:
        if main:
            run.set_status("stopped", step=step, reason=stop.received.name)
        say(
            f"stopped at step {step} of {trainer.state.max_steps}; "
            f"go on with: qtrain run --resume --out {run.path}"
        )
        return Outcome(run, "stopped", step, {})
    figures = _finish(trainer, run)
    _say_fallbacks(kernels, say)
    return Outcome(run, "finished", step, figures)


def _say_fallbacks(kernels: LoraKernels, say: Say) -> None:
    """A layer whose path was lora_linear and which peft served after all."""
    for reason, layers in kernels.fallbacks.items():
        say(f"lora_linear: peft's forward ran in {len(layers)} layers at times: {reason}")


def _finish(trainer: LogprobTrainer, run: RunDir) -> dict[str, Any]:
    """Evaluate, write the adapter under its final name, and say so in status.json."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    figures: dict[str, Any] = {"final_loss": losses[-1] if losses else None}
    if trainer.eval_dataset is not None:
        figures |= trainer.evaluate()
    if main_process():
        partial = run.path / ".adapter.partial"
        shutil.rmtree(partial, ignore_errors=True)
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(str(partial))
        (partial / "README.md").unlink(missing_ok=True)  # peft's unfilled model card
        # what training rendered with, for whoever serves the adapter
        (partial / "chat_template.jinja").write_text(trainer.chat_template, encoding="utf-8")
        write_checksums(partial)
        shutil.rmtree(run.adapter, ignore_errors=True)
        partial.replace(run.adapter)
        run.set_status("finished", step=trainer.state.global_step, **figures)
    trainer.accelerator.wait_for_everyone()
    return figures


def _make_trainer(
    recipe: Recipe, run: RunDir, data: Data, prepared: Prepared, console: Console, say: Say
) -> tuple[LogprobTrainer, StopOnSignal]:
    metrics = MetricsFile(run.metrics)
    stop = StopOnSignal(say)
    callbacks: list[Any] = [metrics, stop]
    if main_process():
        callbacks.append(
            ProgressBar(console, metrics) if console.is_terminal else PlainProgress(say, metrics)
        )
        callbacks.append(TensorBoard(run.tensorboard))
    arguments: dict[str, Any] = {
        "run": run,
        "model": prepared.model,
        "args": training_arguments(recipe, run, prepared.base),
        "train_rows": data.train,
        "eval_rows": data.held_out,
        "collate": prepared.collate,
        "keep_checkpoints": recipe.training.keep_checkpoints,
        "callbacks": callbacks,
        "say": say,
        "chat_template": data.train.encoder.chat_template,
    }
    if recipe.training.method == "sft":
        trainer: LogprobTrainer = SftTrainer(**arguments)
    else:
        # the trainer first: it is what starts the process group that the reference is shared over
        trainer = DpoTrainer(dpo=recipe.dpo, reference=torch.empty(0, 2), **arguments)
        trainer.reference = _reference(recipe, run, data.train, prepared, trainer, console, "train")
        if data.held_out is not None:
            trainer.eval_reference = _reference(
                recipe, run, data.held_out, prepared, trainer, console, "held-out"
            )
    trainer.remove_callback(PrinterCallback)
    return trainer, stop


def _reference(
    recipe: Recipe,
    run: RunDir,
    rows: Any,
    prepared: Prepared,
    trainer: LogprobTrainer,
    console: Console,
    name: str,
) -> torch.Tensor:
    """Log-probs under the policy that the run starts from: the model as prepared, before any step."""
    adapter = adapter_hash(recipe.parent / "adapter") if recipe.parent else "base"
    key = reference_key(
        rows.fingerprint,
        prepared.base.folder,
        adapter,
        recipe.model.model_dump_json(),
        str(prepared.base.compute.dtype),
    )
    path = run.reference if name == "train" else run.reference.with_name("reference_logps_eval.npy")
    accelerator = trainer.accelerator
    model = prepared.model.to(accelerator.device) if recipe.model.quantization == "none" else prepared.model
    with Progress(
        console=console, transient=True, disable=not (main_process() and console.is_terminal)
    ) as progress:
        task = progress.add_task(f"reference log-probs ({name})", total=len(rows))
        return reference_logps(
            score_pairs(model, prepared.collate, rows, accelerator.device),
            len(rows),
            path,
            key=key,
            batch_size=recipe.training.batch_size,
            shard=(accelerator.process_index, accelerator.num_processes),
            advance=lambda count: progress.advance(task, count),
        )


def _write_manifest(
    run: RunDir, recipe: Recipe, data: Data, prepared: Prepared, trainer: LogprobTrainer
) -> None:
    if not main_process():
        return
    write_json(
        run.manifest,
        {
            **provenance(),
            "base": {
                "name": recipe.model.name,
                "folder": prepared.base.folder,
                "files": base_hashes(prepared.base.folder),
            },
            "parent": None if recipe.parent is None else str(recipe.parent),
            "data": {
                "train": data.train.report.as_dict(),
                "eval": None if data.held_out is None else data.held_out.report.as_dict(),
            },
            "seed": recipe.training.seed,
            "processes": trainer.accelerator.num_processes,
            "distribution": requested(recipe.training.fsdp)
            or ("ddp" if trainer.accelerator.num_processes > 1 else "none"),
            "choices": {
                **prepared.notes,
                "packing": f"{prepared.packed}: {prepared.base.attention.reason}",
                "shared_prompts": str(prepared.shared_prompts),
                "gradient_checkpointing": str(use_checkpointing(recipe, prepared.base)),
            },
            "kernels": {"lora_linear": prepared.kernels.as_dict()},
        },
    )


__all__ = ["Outcome", "begin_run", "local_rank", "stored_recipe", "train", "wrapping"]
