"""A kernel as executable code: each basic block becomes, when first reached, a function of numpy arrays.

A block function is f(R, S, M, m): R the register file (one array over all lanes each), S the launch state,
M the memory, m the mask of active lanes (None where all are active). It returns the next block's number, or
(predicate, taken, not taken) of a divergent branch.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from . import floats, integers, matrix
from .blocks import Block, BlockFunction, split_into_blocks
from .emit_arithmetic import Arithmetic
from .emit_bits import Bits
from .emit_compare import Compare
from .emit_convert import Convert
from .emit_memory import Control, MemoryAccess
from .emit_warp import Warp
from .emitter import Constants
from .isa import Instr, Kernel
from .parser import parse

_FIRST_VARIABLE_REGION = 20000  # of module-level variables, which live as long as the program


class Generator(Arithmetic, Bits, Compare, Convert, Warp, MemoryAccess, Control):
    """All opcodes."""

    def source(self) -> str:
        """Python source of the block's function."""
        instrs = self.block.instrs
        i = 0
        while i < len(instrs):
            group = 0
            while i + group < len(instrs) and self._joins(instrs[i + group], instrs[i]):
                group += 1
            if group:
                self.mma_group(instrs[i : i + group])
            else:
                self._instruction(instrs[i])
            i += max(group, 1)
        self.store_registers()
        self.emit(self.exit_line)
        return "def block(R, S, M, m):\n" + "\n".join(self.lines) + "\n"

    @staticmethod
    def _joins(instr: Instr, first: Instr) -> bool:
        return instr.op == "mma" and instr.parts == first.parts and instr.guard is None

    def _instruction(self, instr: Instr) -> None:
        emit = getattr(self, "op_" + instr.op.lower(), None)
        if emit is None:
            raise NotImplementedError(f"unknown instruction at {instr.where()}")
        try:
            emit(instr)
        except NotImplementedError as error:
            raise NotImplementedError(f"{error} at {instr.where()}") from None
        except (KeyError, ValueError, StopIteration, IndexError, AttributeError) as error:
            raise NotImplementedError(f"unsupported form ({error!r}) at {instr.where()}") from None


class Program:
    """A parsed kernel, its blocks and their code."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.blocks = split_into_blocks(kernel)
        self.variables: dict[str, tuple[int, Any]] = {
            name: (_FIRST_VARIABLE_REGION + i, np.frombuffer(data, np.uint8))
            for i, (name, data) in enumerate(kernel.module_variables.items())
        }
        addresses = {
            name: region << 48 | array.ctypes.data for name, (region, array) in self.variables.items()
        }
        self.constants = Constants(addresses)

    def compile(self, block: Block, masked: bool) -> BlockFunction:
        """Generate and keep a block's function."""
        source = Generator(self.kernel, self.constants, block, masked).source()
        environment = {**vars(floats), **vars(integers), "mma": matrix.mma, **self.constants.values}
        name = f"<ptx {self.kernel.name} block {block.index}{' masked' if masked else ''}>"
        exec(compile(source, name, "exec"), environment)
        function: BlockFunction = environment["block"]
        if masked:
            block.masked = function
        else:
            block.fast = function
        return function


@functools.lru_cache(maxsize=64)
def program(ptx: str) -> Program:
    """The program of a PTX text; code generated for it is kept for later launches."""
    return Program(parse(ptx))
