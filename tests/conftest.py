"""Settings that have to be made before torch is imported."""

import os

# OpenMP's threads sleep while they wait, as under the command line: CI shares its cores
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
