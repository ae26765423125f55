"""One core and one seed: the emulator is numpy on arrays that are too small to share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread_and_seed(one_thread: None) -> None:
    torch.manual_seed(0)
