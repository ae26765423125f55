"""Run directories: what they hold and how they are read."""
