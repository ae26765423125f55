"""What every test needs: settings made before torch is imported, and one thread for those that ask."""

import os
from collections.abc import Iterator

import pytest

# OpenMP's threads sleep while they wait, as under the command line: CI shares its cores
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch on one core, for arrays too small to share. Put back afterwards: sums depend on the number."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
