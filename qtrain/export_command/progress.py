"""How far an export is: a bar in a terminal, a line for each file or layer elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from qtrain.export.layerwise import Step


@contextmanager
def shard_progress(console: Console, total: int) -> Iterator[Callable[[str, int], None]]:
    """Yield `advance(file, bytes)`, to be called when a file of the base has been dealt with."""
    if not console.is_terminal:
        done = 0

        def tell(file: str, size: int) -> None:
            nonlocal done
            done += size
            console.print(f"{file}: {min(done / max(total, 1), 1):.0%}", highlight=False, markup=False)

        yield tell
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("merge", total=total)

        def advance(file: str, size: int) -> None:
            progress.update(task, advance=size, description=file)

        yield advance


class ModuleProgress:
    """How far the quantising is.

    Attributes:
        notes: (module, what a user should know of).
    """

    def __init__(self, console: Console, bar: Progress | None, total: int) -> None:
        self.notes: list[tuple[str, str]] = []
        self._console = console
        self._bar = bar
        self._task = None if bar is None else bar.add_task("quantise", total=total)
        self._layer: list[Step] = []

    def skip(self, modules: int) -> None:
        """They are finished already."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=modules)

    def step(self, step: Step) -> None:
        """A module is done."""
        if step.note:
            self.notes.append((step.module, step.note))
        if self._bar is not None and self._task is not None:
            loss = "16 bits" if step.error is None else f"loss {step.error:.2e}"
            name = ".".join(step.module.split(".")[-2:])
            self._bar.update(
                self._task,
                advance=1,
                description=f"layer {step.layer + 1}/{step.layers}  {name}  {loss}",
            )
            return
        if self._layer and self._layer[-1].layer != step.layer:
            self.flush()
        self._layer.append(step)

    def say(self, what: str) -> None:
        """Something else is worked at."""
        self.flush()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=what)
        else:
            self._console.print(what, highlight=False, markup=False)

    def flush(self) -> None:
        """Print the layer that was collected."""
        if not self._layer:
            return
        first = self._layer[0]
        losses = "  ".join(
            f"{step.module.rpartition('.')[2]} {'16 bits' if step.error is None else f'{step.error:.2e}'}"
            for step in self._layer
        )
        seconds = sum(step.seconds for step in self._layer)
        self._console.print(
            f"layer {first.layer + 1}/{first.layers}: {losses}  ({seconds:.1f} s)",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        self._layer = []


@contextmanager
def module_progress(console: Console, layers: int, modules: int, done: int) -> Iterator[ModuleProgress]:
    """A bar in a terminal with layer, module and loss; a line for each layer elsewhere.

    Args:
        modules: of all layers.
        done: layers that are finished already.
    """
    if not console.is_terminal:
        progress = ModuleProgress(console, None, modules)
        yield progress
        progress.flush()
        return
    columns = (
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as bar:
        progress = ModuleProgress(console, bar, modules)
        progress.skip(done * modules // layers)
        yield progress
