"""Exact checks, generation, comparison of runs."""
