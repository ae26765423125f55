"""The ops: each a public function with a float64 reference, usable alone in any training loop.

Importing this package imports nothing else: names resolve on first use. Besides the speed of
`qtrain --help`, that keeps `import transformers` working from the repository's root, where this
folder answers to the name of Hugging Face's `kernels` and is imported to look for a version.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .choice import BackendChoice as BackendChoice
    from .choice import backends as backends
    from .choice import force_backend as force_backend
    from .logprob import LogprobOutput as LogprobOutput
    from .logprob import linear_logprob as linear_logprob
    from .lora import lora_linear as lora_linear
    from .lora import lora_linear_group as lora_linear_group
    from .nf4 import NF4Weight as NF4Weight
    from .nf4 import nf4_dequantize as nf4_dequantize

_HOME = {
    "BackendChoice": "choice",
    "backends": "choice",
    "force_backend": "choice",
    "LogprobOutput": "logprob",
    "linear_logprob": "logprob",
    "lora_linear": "lora",
    "lora_linear_group": "lora",
    "NF4Weight": "nf4",
    "nf4_dequantize": "nf4",
}

__all__ = [
    "BackendChoice",
    "LogprobOutput",
    "NF4Weight",
    "backends",
    "force_backend",
    "linear_logprob",
    "lora_linear",
    "lora_linear_group",
    "nf4_dequantize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOME[name]}", __name__), name)
