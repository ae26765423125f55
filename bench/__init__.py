"""Timed comparisons with the peers."""
