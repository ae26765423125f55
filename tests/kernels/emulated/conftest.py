"""These tests run compiled kernels, which Triton's interpreter would take the place of."""

from __future__ import annotations

import os

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        skip = pytest.mark.skip(reason="TRITON_INTERPRET=1: nothing is compiled")
        for item in items:
            if "emulated" in item.path.parts:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _one_thread_and_seed(one_thread: None) -> None:
    torch.manual_seed(0)
