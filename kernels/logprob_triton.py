"""linear_logprob on a GPU: its launches.

Forward, for up to `ROWS_AT_ONCE` labelled rows at a time, and as many words as `CHUNK_ELEMENTS` allow:

    `_statistics_kernel`  z = cap(scale (h W^T + b)) of a [128, 256] tile in registers; its row maxima m, sums
                          of exp(z - m) and of exp(z - m) (z - m); for u, P = slope exp(z - m) in 16 bits
    `_units_kernel`       how rows are rescaled from tile to tile as their maximum grows
    `_accumulate_kernel`  U += P W with that rescaling
    `_finish_kernel`      the label's own logit, logp, lse, entropy and u = dlogp/dh, to their rows

Without u there is one chunk, and only the first and the last kernel. For a head that learns:

    `_logit_gradient_kernel`  dz = g (onehot - p) slope scale, in 16 bits
    `_head_gradient_kernel`   dW = dz^T h

The label is left out of its tile and comes in at the end, with its exact logit. No atomics and no sizes that
depend on the GPU: same bits on every run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from .logprob_gemm_triton import (
    _accumulate_kernel,
    _head_gradient_kernel,
    _logit_gradient_kernel,
    _statistics_kernel,
)
from .logprob_inputs import LogprobInputs
from .logprob_rows_triton import _finish_kernel, _units_kernel

ROWS_AT_ONCE = 4096
HEAD_ROWS_AT_ONCE = 8192  # where dW is computed: more, as the words of a chunk can then be fewer
CHUNK_ELEMENTS = 2**25  # of P or dz: 64 MiB
PROGRAMS = 128  # `_accumulate_kernel` splits the words among this many where rows and columns give fewer


@dataclass(frozen=True, slots=True)
class Gemm:
    """Tile of a GEMM, [rows, columns] in steps of `step`."""

    rows: int
    columns: int
    step: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, Any]:
        """Of the launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


# `docs/kernels.md` has what else was tried. LOGITS.columns is the tile of words everywhere.
LOGITS = Gemm(128, 256, 64, num_warps=8, num_stages=3)
WIDE = Gemm(
    128, 256, 64, num_warps=8, num_stages=3
)  # of U: for hidden sizes that are a multiple of its width
NARROW = Gemm(128, 128, 64, num_warps=8, num_stages=4)
HEAD = Gemm(128, 256, 32, num_warps=8, num_stages=5)
UNITS_ROWS = 128
FINISH = {"BM": 8, "BT": 64}
LIGHT = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}


def forward(
    inputs: LogprobInputs, want_u: bool, want_entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """logp, lse, entropy [M] and u [M, H] in the dtype of the hidden states."""
    logp, lse, entropy = inputs.per_row(), inputs.per_row(), inputs.per_row()
    u = inputs.gradient() if want_u else None
    # u is written as float32 where the hidden states are neither that nor of the weight's dtype
    written = u if u is None or u.dtype in (inputs.weight.dtype, torch.float32) else u.float()
    head = _Head(inputs)
    for rows in _row_tiles(inputs, ROWS_AT_ONCE):
        _forward_rows(inputs, head, rows, (logp, lse, entropy), written)
    if u is not None and written is not None and written is not u:
        u.copy_(written)
    return logp, lse, entropy if want_entropy else None, u


class _Head:
    """The weight's side of every launch, and the numbers."""

    def __init__(self, inputs: LogprobInputs) -> None:
        self.weight = _ready(inputs.weight)
        self.vocab, self.hidden = self.weight.shape
        self.tiles = triton.cdiv(self.vocab, LOGITS.columns)
        self.bias = None if inputs.bias is None else _ready(inputs.bias.float())
        self.nothing = torch.zeros(
            1, dtype=torch.float32, device=self.weight.device
        )  # for a pointer not used
        self.inv_cap = 0.0 if inputs.softcap is None else 1.0 / inputs.softcap
        self.softcap = inputs.softcap or 0.0
        self.scale = inputs.scale
        self.accumulate = WIDE if self.hidden % WIDE.columns == 0 else NARROW

    def logit_arguments(self) -> dict[str, Any]:
        """Of the kernels that compute a logit."""
        return {
            "w_ptr": self.weight,
            "bias_ptr": self.nothing if self.bias is None else self.bias,
            "has_bias": int(self.bias is not None),
            "H": self.hidden,
            "scale": self.scale,
            "softcap": self.softcap,
            "inv_cap": self.inv_cap,
        }

    def chunks(self, padded: int) -> tuple[int, list[tuple[int, int]]]:
        """(tiles of the largest, [(first tile, tiles)]), of about the same size."""
        most = max(1, CHUNK_ELEMENTS // (padded * LOGITS.columns))
        size = triton.cdiv(self.tiles, triton.cdiv(self.tiles, most))
        firsts = range(0, self.tiles, size)
        return size, [(first, min(size, self.tiles - first)) for first in firsts]


def _ready(tensor: Tensor) -> Tensor:
    """Contiguous, and at an address that 16-byte accesses can start from."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _row_tiles(inputs: LogprobInputs, most: int) -> Iterator[slice]:
    """Of about the same size, cut at multiples of a tile's rows."""
    count = inputs.rows.numel()
    parts = triton.cdiv(count, most)
    size = _padded(triton.cdiv(count, parts)) if parts else 1
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


def _padded(rows: int) -> int:
    return int(triton.cdiv(rows, LOGITS.rows) * LOGITS.rows)


def _filled(values: Tensor, padded: int, fill: float, dtype: torch.dtype) -> Tensor:
    """One value a row, and `fill` for the rows that the last tile has too many."""
    full = torch.full((padded,), fill, dtype=dtype, device=values.device)
    full[: values.numel()] = values
    return full


def _forward_rows(
    inputs: LogprobInputs,
    head: _Head,
    rows: slice,
    results: tuple[Tensor, Tensor, Tensor],
    u: Tensor | None,
) -> None:
    h, count = _ready(inputs.hidden_tile(rows)), rows.stop - rows.start
    padded = _padded(count)
    labels = _filled(inputs.labels[rows], padded, -1, torch.int32)
    top, total, moment = (
        torch.empty(head.tiles, padded, dtype=torch.float32, device=h.device) for _ in range(3)
    )
    statistics = {"max_ptr": top, "sum_ptr": total, "moment_ptr": moment, "padded": padded}
    tiles = {"h_ptr": h, "label_ptr": labels, "rows": count, **statistics, **head.logit_arguments()}
    softmax = None
    if u is None:
        _statistics(tiles, head, 0, head.tiles, None)
    else:
        softmax = _Softmax(head, padded, h.dtype, h.device)
        for first, size in softmax.chunks:
            _statistics(tiles, head, first, size, softmax.p)
            softmax.add(top, first, size)
    logp, lse, entropy = results
    _finish_kernel[(triton.cdiv(count, FINISH["BM"]),)](
        **tiles,
        place_ptr=inputs.rows[rows],
        running_ptr=top if softmax is None else softmax.running,
        weighted_ptr=top if softmax is None else softmax.u,
        logp_ptr=logp,
        lse_ptr=lse,
        entropy_ptr=entropy,
        u_ptr=logp if u is None else u,
        tiles=head.tiles,
        splits=0 if softmax is None else softmax.splits,
        WANT_U=u is not None,
        BH=head.accumulate.columns,
        **FINISH,
        **LIGHT,
    )


def _statistics(tiles: dict[str, Any], head: _Head, first: int, size: int, p: Tensor | None) -> None:
    _statistics_kernel[(tiles["padded"] // LOGITS.rows, size)](
        **tiles,
        p_ptr=head.weight if p is None else p,
        vocab=head.vocab,
        first_tile=first,
        STORE=p is not None,
        BM=LOGITS.rows,
        BN=LOGITS.columns,
        BK=LOGITS.step,
        INTERPRET=triton.knobs.runtime.interpret,
        **LOGITS.options,
    )


class _Softmax:
    """U = sum_v slope_v exp(z_v - running) W_v of one row tile, carried along the vocabulary's chunks."""

    def __init__(self, head: _Head, padded: int, dtype: torch.dtype, device: torch.device) -> None:
        size, self.chunks = head.chunks(padded)
        self.head, self.padded, gemm = head, padded, head.accumulate
        self.columns = triton.cdiv(head.hidden, gemm.columns)
        splits = max(1, min(size, PROGRAMS // (self.columns * (padded // gemm.rows))))
        self.per_split = triton.cdiv(size, splits)
        self.splits = triton.cdiv(size, self.per_split)

        def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device=device)

        self.p = new(size, padded, LOGITS.columns, dtype=dtype)
        self.running = new(self.splits, padded)
        self.factor = new(size, padded)
        self.old = new(self.splits, padded)
        self.u = new(self.splits, self.columns, padded, gemm.columns)

    def add(self, top: Tensor, first: int, size: int) -> None:
        """Take a chunk in, whose P and maxima were just written."""
        chunk = {
            "factor_ptr": self.factor,
            "old_ptr": self.old,
            "padded": self.padded,
            "first_tile": first,
            "tiles": size,
            "per_split": self.per_split,
            "add": int(first > 0),
        }
        _units_kernel[(self.padded // UNITS_ROWS, self.splits)](
            max_ptr=top, running_ptr=self.running, BM=UNITS_ROWS, **chunk, **LIGHT
        )
        gemm = self.head.accumulate
        _accumulate_kernel[(self.columns, self.padded // gemm.rows, self.splits)](
            p_ptr=self.p,
            w_ptr=self.head.weight,
            u_ptr=self.u,
            vocab=self.head.vocab,
            H=self.head.hidden,
            **chunk,
            BM=gemm.rows,
            BN=LOGITS.columns,
            BH=gemm.columns,
            BK=gemm.step,
            INTERPRET=triton.knobs.runtime.interpret,
            **gemm.options,
        )


def head_gradient(
    inputs: LogprobInputs, grad: Tensor, logp: Tensor, lse: Tensor, want_weight: bool, want_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dW [V, H], db [V] in the dtypes of weight and bias. grad, logp and lse: [M]."""
    head = _Head(inputs)
    dw = torch.empty(head.weight.shape, dtype=head.weight.dtype, device=grad.device) if want_weight else None
    db = torch.zeros(head.vocab, dtype=torch.float32, device=grad.device) if want_bias else None
    tiles = [_HeadRows(inputs, rows, grad, logp, lse) for rows in _row_tiles(inputs, HEAD_ROWS_AT_ONCE)]
    if tiles:
        largest = max(tile.padded for tile in tiles)
        size, chunks = head.chunks(largest)
        words = size * LOGITS.columns
        dz = torch.empty(words * largest, dtype=head.weight.dtype, device=grad.device)
        partial = head.nothing  # where all rows are in one tile
        if want_weight and len(tiles) > 1:
            partial = torch.empty(words, head.hidden, dtype=torch.float32, device=grad.device)
        for first, count in chunks:
            for number, rows in enumerate(tiles):
                rows.logit_gradient(head, dz, first, count)
                if db is not None:
                    here = slice(first * LOGITS.columns, min((first + count) * LOGITS.columns, head.vocab))
                    tile = dz[: count * LOGITS.columns * rows.padded].view(-1, rows.padded)
                    db[here] += tile[: here.stop - here.start].sum(1, dtype=torch.float32)
                if dw is not None:
                    rows.head_gradient(
                        head, dz, partial, dw, (first, count), number > 0, number == len(tiles) - 1
                    )
    elif dw is not None:
        dw.zero_()
    return dw, None if db is None or inputs.bias is None else db.to(inputs.bias.dtype)


class _HeadRows:
    """One row tile of the head's gradient."""

    def __init__(self, inputs: LogprobInputs, rows: slice, grad: Tensor, logp: Tensor, lse: Tensor) -> None:
        self.h, self.count = _ready(inputs.hidden_tile(rows)), rows.stop - rows.start
        self.padded = _padded(self.count)
        self.labels = _filled(inputs.labels[rows], self.padded, -1, torch.int32)
        place = inputs.rows[rows]
        self.grad, self.logp, self.lse = (
            _filled(values[place], self.padded, 0.0, torch.float32) for values in (grad, logp, lse)
        )

    def logit_gradient(self, head: _Head, dz: Tensor, first: int, count: int) -> None:
        """dz [count, BN, padded] of a chunk of `count` tiles."""
        _logit_gradient_kernel[(self.padded // LOGITS.rows, count)](
            h_ptr=self.h,
            label_ptr=self.labels,
            logp_ptr=self.logp,
            lse_ptr=self.lse,
            grad_ptr=self.grad,
            dz_ptr=dz,
            rows=self.count,
            vocab=head.vocab,
            padded=self.padded,
            first_tile=first,
            **head.logit_arguments(),
            BM=LOGITS.rows,
            BN=LOGITS.columns,
            BK=LOGITS.step,
            INTERPRET=triton.knobs.runtime.interpret,
            **LOGITS.options,
        )

    def head_gradient(
        self,
        head: _Head,
        dz: Tensor,
        partial: Tensor,
        dw: Tensor,
        chunk: tuple[int, int],
        add: bool,
        final: bool,
    ) -> None:
        """dW of the chunk's words, or in float32 what these rows add to it."""
        first, count = chunk
        grid = (triton.cdiv(head.hidden, HEAD.columns), count * LOGITS.columns // HEAD.rows)
        _head_gradient_kernel[grid](
            dz_ptr=dz,
            h_ptr=self.h,
            partial_ptr=partial,
            dw_ptr=dw,
            rows=self.count,
            vocab=head.vocab,
            H=head.hidden,
            padded=self.padded,
            first_tile=first,
            add=int(add),
            final=int(final),
            BN=LOGITS.columns,
            BV=HEAD.rows,
            BH=HEAD.columns,
            BK=HEAD.step,
            INTERPRET=triton.knobs.runtime.interpret,
            **HEAD.options,
        )
