"""How far an export is: a bar in a terminal, a line for each file elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn


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
