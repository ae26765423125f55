"""What SFT and DPO share: log-probs from the model, normalisation, evaluation, safe checkpoints.

A `transformers.Trainer` whose loss is computed from label log-probs and normalised here, over the
whole accumulation window and all processes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from qtrain.errors import QtrainError
from qtrain.runs.atomic import disk_errors
from qtrain.runs.rundir import RunDir

from . import checkpoint
from .batch import Batch, Numbered
from .distributed import check_wrapping


class NonFiniteLoss(QtrainError):
    """The loss or the gradient became NaN or infinite; nothing was updated with it."""


@dataclass(slots=True)
class Tally:
    """Sums since the last log line, over micro-batches: numerators and one denominator."""

    sums: defaultdict[str, Tensor]
    count: float = 0.0
    tokens: int = 0
    supervised: int = 0

    @classmethod
    def empty(cls) -> Tally:
        return cls(defaultdict(lambda: torch.zeros((), dtype=torch.float64)))

    def add_batch(self, batch: Batch, count: int) -> None:
        """Count a batch: what its sums are to be divided by, and its tokens."""
        self.count += count
        mask = batch.get("attention_mask")
        self.tokens += batch["input_ids"].numel() if mask is None else int(mask.sum())
        self.supervised += len(batch["labels"])


class LogprobTrainer(Trainer):
    """Trainer over batches of `batch.py`; subclasses say what a batch's loss is and what it counts.

    `normaliser(batch)` is the number of things that the loss sums over (supervised tokens, pairs) and
    `summed_loss(model, batch)` the sum, so that loss = sum / count over the whole window.
    """

    def __init__(
        self,
        *,
        run: RunDir,
        model: nn.Module,
        args: TrainingArguments,
        train_rows: Any,
        eval_rows: Any | None,
        collate: Callable[[list[Any]], Batch],
        keep_checkpoints: int,
        callbacks: list[Any],
        say: Callable[[str], None],
        chat_template: str = "",
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            train_dataset=Numbered(train_rows),
            eval_dataset=None if eval_rows is None else Numbered(eval_rows),
            data_collator=collate,
            callbacks=callbacks,
        )
        self.run = run
        self.keep_checkpoints = keep_checkpoints
        self.say = say
        self.chat_template = chat_template
        self.train_tally = Tally.empty()
        self.loss_is_scaled_for_ga = True  # this class divides by the whole window
        self._partial_folder: str | None = None

    # -- what a subclass says ---------------------------------------------------------------------

    def normaliser(self, batch: Batch) -> int:
        """How many things the loss of this batch sums over."""
        raise NotImplementedError

    def summed_loss(self, model: nn.Module, batch: Batch, tally: Tally) -> Tensor:
        """The loss of this batch, not divided; adds its metrics' sums to `tally`."""
        raise NotImplementedError

    # -- loss -------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor:
        count = torch.tensor(float(sum(self.normaliser(batch) for batch in batch_samples)), device=device)
        return self.accelerator.reduce(count, reduction="sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """sum / count over the window; times the processes, because DDP averages gradients over them."""
        if return_outputs or num_items_in_batch is None:
            raise NotImplementedError("evaluation does not go through compute_loss")
        total = self.summed_loss(model, inputs, self.train_tally)
        if not bool(torch.isfinite(total)):
            raise NonFiniteLoss(
                f"the loss is {float(total.detach())} at step {self.state.global_step + 1}, training rows "
                f"{self._name_rows(inputs)}; nothing was updated. Lower training.learning_rate or look "
                f"at these rows; the last good checkpoint is kept"
            )
        return total / num_items_in_batch * self.accelerator.num_processes

    def _name_rows(self, batch: Batch) -> str:
        rows = self.train_dataset.rows
        return ", ".join(f"{number} ({rows[number].source})" for number in batch["rows"])

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        if norm is not None and not bool(torch.isfinite(torch.as_tensor(norm))):
            raise NonFiniteLoss(
                f"the gradient's norm is {float(norm)} at step {self.state.global_step + 1}; "
                f"nothing was updated. Lower training.learning_rate; the last good checkpoint is kept"
            )
        return norm

    def logps(self, model: nn.Module, batch: Batch) -> Tensor:
        """Log-probs of the batch's labels, [L]."""
        names = ("input_ids", "attention_mask", "position_ids", "layout", "label_rows", "labels")
        return model(**{name: batch[name] for name in names if name in batch})["logp"]

    def floating_point_ops(self, inputs: Batch) -> int:
        """Not estimated: the usual estimate counts a full head and no 4-bit base."""
        return 0

    # -- distribution -----------------------------------------------------------------------------

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> Any:
        """Refuse to train when what was asked of accelerate is not what it built."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        check_wrapping(self.model_wrapped, self.accelerator, fsdp=bool(self.args.fsdp))
        return prepared

    # -- logging ----------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics gathered since the last line to a training line."""
        if "loss" in logs:
            logs |= self._drain(self.train_tally)
            self.train_tally = Tally.empty()
        super().log(logs, start_time)

    def _drain(self, tally: Tally) -> dict[str, float]:
        """Means over all processes of what a tally holds."""
        names = sorted(tally.sums)
        values = [float(tally.sums[name]) for name in names]
        sums = torch.tensor([*values, tally.count, tally.tokens, tally.supervised], dtype=torch.float64)
        sums = self.accelerator.reduce(sums.to(self.args.device), reduction="sum").cpu()
        count = max(float(sums[-3]), 1.0)
        means = {name: float(value) / count for name, value in zip(names, sums, strict=False)}
        return means | {"tokens": float(sums[-2]), "supervised_tokens": float(sums[-1])}

    # -- evaluation -------------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: Any | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Mean loss and metrics over the held-out rows, each row counted once."""
        model = self.model
        was_training = model.training
        model.eval()
        tally = Tally.empty()
        loss = torch.zeros((), dtype=torch.float64)
        with torch.no_grad():
            for batch in self._eval_batches():
                loss += self.summed_loss(model, batch, tally).double().cpu()
        model.train(was_training)
        tally.sums["loss"] = loss
        means = self._drain(tally)
        metrics = {
            f"{metric_key_prefix}_{name}": value
            for name, value in means.items()
            if name not in ("tokens", "supervised_tokens")
        }
        self.log(metrics)
        return metrics

    def _eval_batches(self) -> Iterator[Batch]:
        """This process's share of the held-out rows, without the repetition that equal shares would need."""
        rows: Any = self.eval_dataset
        mine = range(self.accelerator.process_index, len(rows), self.accelerator.num_processes)
        size = self.args.per_device_eval_batch_size
        for start in range(0, len(mine), size):
            yield self._prepare_inputs(
                self.data_collator([rows[number] for number in mine[start : start + size]])
            )

    # -- checkpoints ------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return self._partial_folder or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write aside, checksum, rename: a checkpoint that has its name is complete."""
        folder, step = self.run.checkpoints, self.state.global_step
        with disk_errors(f"checkpoint-{step}", folder):
            if self.args.should_save:
                checkpoint.begin(folder)
            self.accelerator.wait_for_everyone()
            self._partial_folder = str(checkpoint.partial_parent(folder))
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._partial_folder = None
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoint.commit(folder, step, self.keep_checkpoints)
        self.accelerator.wait_for_everyone()
