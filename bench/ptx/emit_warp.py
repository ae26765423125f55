"""Code of the warp-level instructions: exchange, votes, ldmatrix, mma.sync."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .classify import mma_kind, np_code, reads_writes
from .emitter import Emitter
from .isa import SINK, Addr, Imm, Instr, Not, Operand, Reg, as_tuple

_ACCUMULATOR = {"f32": "f4", "s32": "i4", "f16": "u4", "f64": "f8"}


class Warp(Emitter):
    """op_<opcode> for each opcode."""

    def _check_warps(self, instr: Instr) -> None:
        mask = self.mask(instr)
        if mask is not None:
            self.emit(f"S.check_whole_warps({mask}, {instr.index})")

    @staticmethod
    def _with_predicate(target: Operand) -> tuple[Operand, Operand]:
        return (target[0], target[1]) if isinstance(target, tuple) else (target, SINK)

    def op_shfl(self, instr: Instr) -> None:
        self._check_warps(instr)
        value, lane, clamp = instr.ops[1:4]
        mode = instr.parts[2]
        if isinstance(lane, Imm) and isinstance(clamp, Imm):
            sources = self.temporary(f"S.shuffle({mode!r}, {lane.value}, {clamp.value})")
        else:
            arguments = f"{self.array(lane, 'u4')}, {self.array(clamp, 'u4')}"
            sources = self.temporary(f"S.shuffle_by_register({mode!r}, {arguments})")
        held = self.code_of.get(value.index) if isinstance(value, Reg) else None
        code = "f4" if held == "f4" else "u4"
        # taken before the destination is assigned: it may be the source, too
        taken = self.temporary(f"{self.array(value, code)}.take({sources}[0])")
        target, predicate = self._with_predicate(instr.ops[0])
        self.put(instr, target, taken, code)
        self.put(instr, predicate, f"{sources}[1]", "b")

    def op_vote(self, instr: Instr) -> None:
        self._check_warps(instr)
        source = instr.ops[1]
        value = self.get(source, "b") if isinstance(source, Not) else self.array(source, "b")
        mode = instr.parts[2] if instr.parts[1] == "sync" else instr.parts[1]
        self.put(instr, instr.ops[0], f"S.vote({mode!r}, {value})", "u4" if mode == "ballot" else "b")

    def op_match(self, instr: Instr) -> None:
        self._check_warps(instr)
        mode = "any" if instr.has("any") else "all"
        found = self.temporary(f"S.match({mode!r}, {self.array(instr.ops[1], np_code(instr.dtype))})")
        target, predicate = self._with_predicate(instr.ops[0])
        self.put(instr, target, f"{found}[0]", "u4")
        self.put(instr, predicate, f"{found}[1]", "b")

    def op_redux(self, instr: Instr) -> None:
        self._check_warps(instr)
        code = np_code(instr.dtype)
        self.put(instr, instr.ops[0], f"S.reduce({instr.parts[2]!r}, {self.array(instr.ops[1], code)})", code)

    def op_activemask(self, instr: Instr) -> None:
        self.put(instr, instr.ops[0], f"S.vote('ballot', {self.mask(instr) or 'S.everyone'})", "u4")

    def op_ldmatrix(self, instr: Instr) -> None:
        self._check_warps(instr)
        if not instr.has("m8n8") or instr.dtype != "b16":
            raise NotImplementedError("ldmatrix shape")
        count = int(next(part for part in instr.parts if part in ("x1", "x2", "x4"))[1])
        address = self.address(instr.operand(1, Addr), "shared")
        arguments = f"{instr.index}, {address}, {count}, {instr.has('trans')}, {self.mask(instr)}"
        matrices = self.temporary(f"M.load_matrix({arguments})")
        for i, target in enumerate(as_tuple(instr.ops[0])):
            self.put(instr, target, f"{matrices}[{i}]", "u4")

    def op_movmatrix(self, instr: Instr) -> None:
        self._check_warps(instr)
        self.put(instr, instr.ops[0], f"transpose8x8({self.get(instr.ops[1], 'u4')})", "u4")

    def mma_group(self, group: Iterable[Instr]) -> None:
        """Consecutive mma.sync of one kind: cut into runs without dependences, each run one matmul."""
        run: list[Instr] = []
        written: set[int] = set()
        for instr in group:
            reads, writes = reads_writes(instr)
            if (reads | writes) & written:
                self._mma_run(run)
                run, written = [], set()
            run.append(instr)
            written |= writes
        self._mma_run(run)

    def _mma_run(self, run: list[Instr]) -> None:
        first = run[0]
        (m, n, _), element, accumulator = mma_kind(first)
        self._check_warps(first)
        if element in ("b1", "s4", "u4") or (m, n) != ((8, 8) if element == "f64" else (16, 8)):
            raise NotImplementedError(f"mma shape or type at {first.where()}")
        source = "u8" if element == "f64" else "u4"
        code = _ACCUMULATOR[accumulator]
        # the distinct fragments, and which of them each mma multiplies
        a_fragments: dict[tuple[Any, ...], int] = {}
        b_fragments: dict[tuple[Any, ...], int] = {}
        pairs = [
            (
                a_fragments.setdefault(as_tuple(instr.ops[1]), len(a_fragments)),
                b_fragments.setdefault(as_tuple(instr.ops[2]), len(b_fragments)),
            )
            for instr in run
        ]
        name = f"PAIRS{first.index}"
        self.constants.values[name] = pairs
        a, b = self._fragments(a_fragments, source), self._fragments(b_fragments, source)
        c = self._fragments([as_tuple(instr.ops[3]) for instr in run], code)
        kind = (element, "f2" if accumulator == "f16" else code)
        results = self.temporary(f"mma({kind!r}, {a}, {b}, {c}, {name})")
        targets = [(instr, target) for instr in run for target in as_tuple(instr.ops[0])]
        for i, (instr, target) in enumerate(targets):
            self.put(instr, target, f"{results}[{i}]", code)

    def _fragments(self, fragments: Iterable[tuple[Any, ...]], code: str) -> str:
        tuples = (
            "(" + "".join(f"{self.array(register, code)}, " for register in fragment) + ")"
            for fragment in fragments
        )
        return f"[{', '.join(tuples)}]"
