"""The ops: each a public function with a float64 reference, usable alone in any training loop.

Importing this package imports nothing else: names resolve on first use. Besides the speed of
`qtrain --help`, that keeps `import transformers` working from the repository's root, where this
folder answers to the name of Hugging Face's `kernels` and is imported to look for a version.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backends import BackendChoice as BackendChoice
    from .backends import backends as backends
    from .linear_logprob import LogprobOutput as LogprobOutput
    from .linear_logprob import linear_logprob as linear_logprob

_HOME = {
    "BackendChoice": "backends",
    "backends": "backends",
    "LogprobOutput": "linear_logprob",
    "linear_logprob": "linear_logprob",
}

__all__ = ["BackendChoice", "LogprobOutput", "backends", "linear_logprob"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOME[name]}", __name__), name)
