"""Which tokens of a padding-free batch attend to which."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Block:
    """Tokens [start, stop) attend causally among themselves, and to all of [prefix_start, prefix_stop).

    A whole sequence is a block without a prefix. The rejected answer of a preference pair whose prompt
    is shared is a block whose prefix is the prompt, which lies before the chosen answer.
    """

    start: int
    stop: int
    prefix_start: int = 0
    prefix_stop: int = 0

    @property
    def prefix(self) -> int:
        """Length of the prefix."""
        return self.prefix_stop - self.prefix_start


@dataclass(frozen=True, slots=True)
class Layout:
    """The blocks of one packed row of tokens, in order and without gaps."""

    blocks: tuple[Block, ...]

    @property
    def tokens(self) -> int:
        """Tokens in the packed row."""
        return self.blocks[-1].stop if self.blocks else 0
