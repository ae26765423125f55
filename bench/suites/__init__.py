"""pytest-benchmark suites: `pytest bench/suites`, then again with `--benchmark-compare`."""
