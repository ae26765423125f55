"""mma.sync: groups of independent ones as one batched matmul."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .floats import E4M3, E5M2, Array, f2, f4, f8, i1, i4, u1, u4

Fragment = tuple[Array, ...]


def mma(
    kind: tuple[str, str],
    a_fragments: Sequence[Fragment],
    b_fragments: Sequence[Fragment],
    accumulators: Sequence[Fragment],
    pairs: Sequence[tuple[int, int]],
) -> list[Array]:
    """D = A B + C for each pair (index of A, index of B), all of one shape.

    `kind` is (element, accumulator f4, f2, i4 or f8). `a_fragments` and `b_fragments` hold the distinct
    fragments, each a tuple of registers of all lanes; `accumulators` one for each pair. Returns the
    registers of the results, one pair after the other.

    Fragments are laid out as the PTX manual says: with lane = 4 g + t, register (half, r) of A holds row
    g + 8 r and the elements t of that half of k; B likewise its column g; accumulator (r, j) holds row
    g + 8 r, column 2 t + j. The order along k is immaterial to the sum.
    """
    element, accumulator = kind
    warps = a_fragments[0][0].size // 32
    rows = 1 if len(a_fragments[0]) == 1 else 2
    halves = len(b_fragments[0])
    count_a, count_b, count = len(a_fragments), len(b_fragments), len(pairs)
    a = _unpack(_registers(a_fragments).reshape(count_a, halves, rows, warps, 8, 4), element)
    b = _unpack(_registers(b_fragments).reshape(count_b, halves, warps, 8, 4), element)
    k = a.shape[0] * halves * 4
    a = a.transpose(4, 1, 3, 5, 0, 2, 6).reshape(warps, count_a, rows * 8, k)  # [W, A, r g, element half t]
    b = b.transpose(3, 1, 4, 0, 2, 5).reshape(warps, count_b, 8, k)  # [W, B, g, element half t]
    which_a, which_b = np.array(pairs).T
    if 2 * count >= count_a * count_b:  # most pairs are asked for: one product of all with all
        product = np.matmul(
            a.reshape(warps, count_a * rows * 8, k), b.reshape(warps, count_b * 8, k).transpose(0, 2, 1)
        )
        product = product.reshape(warps, count_a, rows, 8, count_b, 4, 2).transpose(1, 4, 2, 6, 0, 3, 5)
        if list(pairs) == [(i, j) for i in range(count_a) for j in range(count_b)]:
            product = product.reshape(count, rows, 2, warps, 8, 4)
        else:
            product = product[which_a, which_b]
    else:
        product = np.matmul(a[:, which_a], b[:, which_b].transpose(0, 1, 3, 2))
        product = product.reshape(warps, count, rows, 8, 4, 2).transpose(1, 2, 5, 0, 3, 4)
    # [pair r j, lane]
    return _accumulate(product.reshape(count * rows * 2, warps * 32), accumulators, accumulator)


def _registers(fragments: Sequence[Fragment]) -> Array:
    return np.array([register for fragment in fragments for register in fragment])


def _accumulate(product: Array, accumulators: Sequence[Fragment], accumulator: str) -> list[Array]:
    old = _registers(accumulators)
    if accumulator == "i4":
        return list(product.astype(i4) + old.view(i4))
    if accumulator == "f2":  # two columns in each register
        rows, lanes = len(product) // 2, product.shape[1]
        total: Array = product.reshape(rows, 2, lanes).transpose(0, 2, 1) + old.view(f2).reshape(
            rows, lanes, 2
        )
        return list(np.ascontiguousarray(total.astype(f2)).view(u4).reshape(rows, lanes))
    product += old
    return list(product)


def _unpack(registers: Array, element: str) -> Array:
    """Registers -> their elements as floating point, on a new first axis."""
    if element == "bf16":
        return np.stack([registers << u4(16), registers & u4(0xFFFF0000)]).view(f4)
    if element == "f16":
        return np.moveaxis(registers.view(f2).reshape((*registers.shape, 2)), -1, 0).astype(f4)
    if element == "tf32":
        return (registers & u4(0xFFFFE000)).view(f4)[None]
    if element == "f64":
        return registers.view(f8)[None]
    bytes_ = np.moveaxis(registers.view(u1).reshape((*registers.shape, 4)), -1, 0)
    if element == "s8":
        return bytes_.view(i1).astype(f4)
    if element == "u8":
        return bytes_.astype(f4)
    table: Any = {"e4m3": E4M3, "e5m2": E5M2}[element]
    decoded: Array = table[bytes_]
    return decoded
