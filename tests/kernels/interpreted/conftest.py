"""These tests run Triton's interpreter, which has to be chosen before the kernels are defined."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from qtrain.kernels import force_backend
from tests.kernels.poison import poison_empty


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        skip = pytest.mark.skip(
            reason="a session of its own: TRITON_INTERPRET=1 pytest tests/kernels/interpreted"
        )
        for item in items:
            if "interpreted" in item.path.parts:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _triton_on_poisoned_tensors(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    poison_empty(monkeypatch)
    with force_backend("triton"):
        yield
