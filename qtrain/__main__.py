"""`python -m qtrain`, which `torchrun -m qtrain run ...` uses."""

from qtrain.cli import main

main()
