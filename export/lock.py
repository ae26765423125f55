"""One export at a time to a folder: a second one would take the first one's unfinished files for its own."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from .disk import disk_errors
from .errors import ExportError
from .writer import beside


@contextmanager
def only_one(out: Path) -> Iterator[None]:
    """Hold `<name>.lock` beside `out`; the system lets go of it when the process ends, however it does.

    Raises:
        ExportError: another process holds it.
    """
    path = beside(out, "lock")
    with disk_errors("the lock", out):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    with file:
        _take(file, out)
        if os.fstat(file.fileno()).st_nlink == 0:  # it was removed by the one who held it until now
            with only_one(out):
                yield
            return
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _take(file: TextIO, out: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip()
        who = f" (process {holder})" if holder else ""
        raise ExportError(
            f"{out}: another export{who} is writing to it; wait for it, or give another folder: --out"
        ) from None
