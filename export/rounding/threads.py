"""Few threads for many small operations, all of them for the products in between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

FEW = 2**22  # weights that one thread rounds as fast as several do, on two cores
_all_threads: ContextVar[int | None] = ContextVar("_all_threads", default=None)


@contextmanager
def few_threads(weights: int) -> Iterator[None]:
    """One of torch's threads where there are few weights: splitting small operations takes longer."""
    if weights > FEW:
        yield
        return
    count = torch.get_num_threads()
    token = _all_threads.set(count)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)
        _all_threads.reset(token)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b on all of torch's threads, within `few_threads` too."""
    count = _all_threads.get()
    if count is None:
        return a @ b
    torch.set_num_threads(count)
    try:
        return a @ b
    finally:
        torch.set_num_threads(1)
