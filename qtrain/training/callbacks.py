"""What happens beside the loop: metrics.jsonl, the progress bar, and a clean stop on a signal."""

from __future__ import annotations

import json
import math
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qtrain.runs.atomic import write_text


def peak_memory_mib() -> float:
    """Peak of this process: allocated on the CUDA device where there is one, resident otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class MetricsFile(TrainerCallback):
    """One JSON line a logged step, with speed and memory.

    A resumed run drops the lines that it will write again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last: dict[str, Any] = {}
        self._since = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget what lies beyond the step that the run goes on from."""
        self._since = time.perf_counter()
        if state.is_world_process_zero and self.path.is_file():
            kept = [
                line
                for line in self.path.read_text(encoding="utf-8").splitlines()
                if _step(line) <= state.global_step
            ]
            write_text(self.path, "".join(line + "\n" for line in kept))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the line."""
        line = {"step": state.global_step, **(logs or {})}
        line.pop("total_flos", None)
        if "tokens" in line:
            now = time.perf_counter()
            line["tokens_per_second"] = round(line["tokens"] / max(now - self._since, 1e-9), 1)
            line["peak_memory_mib"] = round(peak_memory_mib(), 1)
            self._since = now
        if "eval_loss" in line:
            self._since = time.perf_counter()  # the evaluation's time is not the next steps'
        self.last = self.last | line
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # cut off by a kill: written again


class TensorBoard(TrainerCallback):
    """The numbers of metrics.jsonl as TensorBoard scalars, with the same names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the event file; what lies beyond the step that the run goes on from is purged."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.folder), purge_step=state.global_step + 1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the scalars."""
        if self.writer is None:
            return
        for name, value in (logs or {}).items():
            group = "eval" if name.startswith("eval_") else "train"
            self.writer.add_scalar(f"{group}/{name.removeprefix('eval_')}", value, state.global_step)
        self.writer.flush()


class ProgressBar(TrainerCallback):
    """A bar with loss, tokens a second, supervised tokens, peak memory and the time left."""

    def __init__(self, console: Console, metrics: MetricsFile) -> None:
        self.metrics = metrics
        self.supervised = 0.0
        self.console = console
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            console=console,
        )
        self.task: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar at the step that the run starts from."""
        self.progress.start()
        self.task = self.progress.add_task(
            "train", total=state.max_steps, completed=state.global_step, figures=""
        )

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Refresh the figures (after MetricsFile, which comes first in the list, has worked them out)."""
        last = self.metrics.last
        if self.task is None or "tokens_per_second" not in last:
            return
        self.supervised += (kwargs.get("logs") or {}).get("supervised_tokens", 0.0)
        figures = [f"loss {last['loss']:.4f}"] if "loss" in last else []
        if "rewards/accuracies" in last:
            figures.append(f"acc {last['rewards/accuracies']:.2f}")
        figures += [f"{last['tokens_per_second']:.0f} tok/s", f"{self.supervised:.0f} supervised"]
        figures.append(f"{last['peak_memory_mib'] / 1024:.1f} GiB")
        self.progress.update(self.task, figures=" · ".join(figures))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move on; without a terminal, a plain line now and then."""
        self.progress.update(self.task, completed=state.global_step)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Leave the finished bar standing."""
        self.progress.stop()


class PlainProgress(TrainerCallback):
    """Where the output is no terminal: a line about every twentieth of the way."""

    def __init__(self, say: Callable[[str], None], metrics: MetricsFile) -> None:
        self.say, self.metrics = say, metrics

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The same figures as the bar."""
        every = max(state.max_steps // 20, 1)
        last = self.metrics.last
        if "loss" in (kwargs.get("logs") or {}) and (
            state.global_step % every == 0 or state.global_step <= 1
        ):
            self.say(
                f"step {state.global_step}/{state.max_steps}  loss {last['loss']:.4f}  "
                f"{last.get('tokens_per_second', 0):.0f} tok/s  "
                f"{last.get('supervised_tokens', 0):.0f} supervised tokens  "
                f"peak {last.get('peak_memory_mib', 0):.0f} MiB"
            )


class StopOnSignal(TrainerCallback):
    """SIGINT or SIGTERM: finish the step, save, stop. A second one stops at once."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.received: signal.Signals | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        self.say(f"{self.received.name}: finishing this step and saving; once more stops at once")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """All processes stop after the same step: a signal may have reached only one of them."""
        if _any_process(self.received is not None, args.device):
            control.should_save = state.global_step < state.max_steps
            control.should_training_stop = True
        return control


def _any_process(flag: bool, device: torch.device) -> bool:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return flag
    value = torch.tensor(float(flag), device=device)
    torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
    return bool(value)
