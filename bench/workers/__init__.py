"""Programs that each run one variant in its own process and environment, and write one JSON file.

A worker imports the library that it measures (ours or a peer's) and, of this package, only what needs
nothing but the standard library: `measure`, `workload` and `common`.
"""
