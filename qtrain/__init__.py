"""qtrain: from a few thousand examples to a better model, on one card, in one tool.

The package imports nothing heavy; every command imports what it needs when it runs.
"""

__version__ = "0.1.0"
