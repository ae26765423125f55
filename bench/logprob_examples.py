"""Example launches of the log-prob kernels: one chunk of the vocabulary, one split of its tiles.

`expected` is NaN where nobody looks: rows, words and columns that the last tiles have too many.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from qtrain.kernels.logprob_triton import LOGITS
from qtrain.kernels.specimens import Specimen

from .examples import Example, Shape, dtype_of, nbytes, poisoned

SCALE, SOFTCAP = 0.7, 12.0


def example(specimen: Specimen, shape: Shape, seed: int = 0) -> Example:
    """Inputs from a seed; with bias and soft-cap.

    Raises:
        KeyError: the specimen is of no kernel that this file knows.
    """
    builders = {
        "_statistics_kernel": _statistics,
        "_units_kernel": _units,
        "_accumulate_kernel": _accumulate,
        "_finish_kernel": _finish,
        "_logit_gradient_kernel": _logit_gradient,
        "_head_gradient_kernel": _head_gradient,
    }
    build = builders[specimen.kernel.__name__]
    return build(specimen, _Inputs(specimen, shape, torch.Generator().manual_seed(seed)))


def _part(values: Tensor, *shape: int) -> Tensor:
    """`values` in the first corner of NaNs."""
    whole = torch.full(shape, torch.nan, dtype=torch.float64)
    whole[tuple(slice(size) for size in values.shape)] = values
    return whole


class _Inputs:
    """h [rows, H], W [vocab, H], labels, and the logits that they give, in float64."""

    def __init__(self, specimen: Specimen, shape: Shape, generator: torch.Generator) -> None:
        self.rows, self.vocab, self.hidden = shape.rows, shape.outputs, shape.inner
        self.generator = generator
        low = specimen.signature.get("w_ptr", specimen.signature.get("h_ptr", "*bf16"))
        self.dtype = {"*bf16": torch.bfloat16, "*fp16": torch.float16}[low]
        self.tiles = -(-self.vocab // LOGITS.columns)
        self.padded = -(-self.rows // LOGITS.rows) * LOGITS.rows
        self.h = self.random(self.rows, self.hidden).to(self.dtype)
        self.weight = (self.random(self.vocab, self.hidden) * 8 / self.hidden**0.5).to(self.dtype)
        self.bias = self.random(self.vocab)
        self.labels = torch.full((self.padded,), -1, dtype=torch.int32)
        self.labels[: self.rows] = torch.randint(self.vocab, (self.rows,), generator=generator)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    @cached_property
    def logits(self) -> Tensor:
        """[rows, vocab]."""
        z = SCALE * (self.h.double() @ self.weight.double().T + self.bias.double())
        return SOFTCAP * torch.tanh(z / SOFTCAP)

    @cached_property
    def softmax(self) -> _Tiles:
        """Of all words but the labels, tile by tile."""
        words = torch.arange(self.tiles * LOGITS.columns)
        z = torch.full((self.rows, words.numel()), -torch.inf, dtype=torch.float64)
        z[:, : self.vocab] = self.logits
        z = torch.where(words == self.labels[: self.rows, None], -torch.inf, z)
        z = z.view(self.rows, self.tiles, LOGITS.columns).transpose(0, 1)  # [tile, rows, BN]
        top = z.amax(2)
        centred = (z - top.clamp_min(-1e30)[:, :, None]).clamp_min(-1e30)
        e = centred.exp()
        p = e * (1 - (z.clamp_min(-1e30) / SOFTCAP).square()).where(e > 0, torch.zeros(()).double())
        return _Tiles(top, e.sum(2), (e * centred).sum(2), p)

    def filled(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """float32, [..., padded]."""
        full = torch.full((*values.shape[:-1], self.padded), fill, dtype=torch.float32)
        full[..., : self.rows] = values
        return full

    def logit_arguments(self) -> dict[str, Any]:
        numbers = {"has_bias": 1, "scale": SCALE, "softcap": SOFTCAP, "inv_cap": 1 / SOFTCAP}
        pointers = {"h_ptr": self.h, "w_ptr": self.weight, "bias_ptr": self.bias, "label_ptr": self.labels}
        return {**pointers, **numbers, "rows": self.rows, "H": self.hidden, "padded": self.padded}


@dataclass(frozen=True)
class _Tiles:
    top: Tensor  # [tile, rows]
    total: Tensor
    moment: Tensor
    p: Tensor  # [tile, rows, BN], slope included


def _statistics(specimen: Specimen, inputs: _Inputs) -> Example:
    softmax, store = inputs.softmax, bool(specimen.constexprs["STORE"])
    outputs = {
        name: poisoned(inputs.tiles, inputs.padded, dtype=torch.float32)
        for name in ("max_ptr", "sum_ptr", "moment_ptr")
    }
    outputs["p_ptr"] = poisoned(inputs.tiles, inputs.padded, LOGITS.columns, dtype=inputs.dtype)
    written = [tensor for name, tensor in outputs.items() if store or name != "p_ptr"]
    values = {"max_ptr": softmax.top, "sum_ptr": softmax.total, "moment_ptr": softmax.moment}
    if store:
        values["p_ptr"] = softmax.p
    expected = {name: _part(value, *outputs[name].shape) for name, value in values.items()}
    arguments = {**inputs.logit_arguments(), **outputs, "vocab": inputs.vocab, "first_tile": 0}
    return Example(
        specimen,
        (inputs.padded // LOGITS.rows, inputs.tiles),
        arguments,
        expected,
        nbytes(inputs.h, inputs.weight, inputs.bias, inputs.labels, *written),
    )


def _chunk(inputs: _Inputs, add: bool) -> dict[str, int]:
    numbers = {"padded": inputs.padded, "first_tile": 0, "tiles": inputs.tiles}
    return {**numbers, "per_split": inputs.tiles, "add": int(add)}


def _units(specimen: Specimen, inputs: _Inputs) -> Example:
    top = inputs.random(inputs.tiles, inputs.rows) * 20
    running = inputs.random(1, inputs.rows) * 20
    grown = torch.maximum(top.amax(0, keepdim=True), running).double()
    units = torch.cat([torch.maximum(top.double(), grown - 40), grown])
    arguments: dict[str, Any] = {
        "max_ptr": inputs.filled(top),
        "running_ptr": inputs.filled(running),
        "factor_ptr": poisoned(inputs.tiles, inputs.padded, dtype=torch.float32),
        "old_ptr": poisoned(1, inputs.padded, dtype=torch.float32),
    }
    values = {
        "running_ptr": grown,
        "factor_ptr": (units[:-1] - units[1:]).exp(),
        "old_ptr": (running.double() - grown).exp(),
    }
    expected = {name: _part(value, *arguments[name].shape) for name, value in values.items()}
    ideal = nbytes(*arguments.values()) + nbytes(arguments["running_ptr"])
    grid = (inputs.padded // int(specimen.constexprs["BM"]), 1)
    return Example(specimen, grid, {**arguments, **_chunk(inputs, add=True)}, expected, ideal)


def _accumulate(specimen: Specimen, inputs: _Inputs) -> Example:
    width = int(specimen.constexprs["BH"])
    columns = -(-inputs.hidden // width)
    p = torch.zeros(inputs.tiles * LOGITS.columns, inputs.padded)
    p[: inputs.vocab, : inputs.rows] = torch.rand(inputs.vocab, inputs.rows, generator=inputs.generator)
    p = p.view(inputs.tiles, LOGITS.columns, inputs.padded).transpose(1, 2).to(inputs.dtype).contiguous()
    factor = torch.rand(inputs.tiles, inputs.padded, generator=inputs.generator) + 0.5
    old = torch.rand(1, inputs.padded, generator=inputs.generator)
    u = inputs.random(1, columns, inputs.padded, width)
    total = torch.zeros(inputs.padded, inputs.hidden, dtype=torch.float64)
    for tile, words in enumerate(inputs.weight.double().split(LOGITS.columns)):
        total += p[tile].double()[:, : words.shape[0]] @ words
        total *= factor[tile].double()[:, None]
    before = u[0].double().transpose(0, 1).flatten(1)
    expected = before * old.double().T + _part(total, *before.shape)
    expected = expected.view(inputs.padded, columns, width).transpose(0, 1)[None]
    arguments = {"p_ptr": p, "w_ptr": inputs.weight, "factor_ptr": factor, "old_ptr": old, "u_ptr": u}
    ideal = nbytes(*arguments.values()) + nbytes(u)
    grid = (columns, inputs.padded // int(specimen.constexprs["BM"]), 1)
    arguments |= {"vocab": inputs.vocab, "H": inputs.hidden, **_chunk(inputs, add=True)}
    return Example(specimen, grid, arguments, {"u_ptr": expected}, ideal)


def _finish(specimen: Specimen, inputs: _Inputs) -> Example:
    softmax, rows, want_u = inputs.softmax, inputs.rows, bool(specimen.constexprs["WANT_U"])
    z = inputs.logits
    own = z.gather(1, inputs.labels[:rows, None].long())[:, 0]
    running = softmax.top.amax(0)
    width = int(specimen.constexprs["BH"])
    columns = -(-inputs.hidden // width)
    beta = (softmax.top - running).exp()[:, :, None]
    p = (softmax.p * beta).transpose(0, 1).flatten(1)[:, : inputs.vocab]
    weighted = torch.zeros(1, columns, inputs.padded, width)
    full = torch.zeros(inputs.padded, columns * width)
    full[:rows, : inputs.hidden] = p @ inputs.weight.double()
    weighted[0] = full.view(inputs.padded, columns, width).transpose(0, 1)
    place = torch.randperm(rows, generator=inputs.generator)
    dtype = dtype_of(specimen, "u_ptr")
    results = {name: poisoned(rows, dtype=torch.float32) for name in ("logp_ptr", "lse_ptr", "entropy_ptr")}
    results["u_ptr"] = poisoned(rows, inputs.hidden, dtype=dtype)
    probabilities = z.softmax(1)
    slope = 1 - (z / SOFTCAP).square()
    onehot = torch.zeros_like(z).scatter_(1, inputs.labels[:rows, None].long(), 1.0)
    values = {
        "logp_ptr": own - z.logsumexp(1),
        "lse_ptr": z.logsumexp(1),
        "entropy_ptr": torch.special.entr(probabilities).sum(1),
    }
    if want_u:
        values["u_ptr"] = SCALE * ((onehot - probabilities) * slope) @ inputs.weight.double()
    expected = {name: torch.empty_like(value).index_copy_(0, place, value) for name, value in values.items()}
    arguments = {
        **inputs.logit_arguments(),
        "place_ptr": place,
        "max_ptr": inputs.filled(softmax.top),
        "sum_ptr": inputs.filled(softmax.total),
        "moment_ptr": inputs.filled(softmax.moment),
        "running_ptr": inputs.filled(running[None]),
        "weighted_ptr": weighted,
        **results,
        "tiles": inputs.tiles,
        "splits": 1,
    }
    words = len(set(inputs.labels[:rows].tolist()))  # rows of W, which labels may share
    ideal = (rows + words) * inputs.hidden * inputs.h.element_size() + 3 * 4 * (inputs.tiles + 1) * rows
    ideal += (nbytes(weighted) + nbytes(results["u_ptr"])) * want_u
    return Example(specimen, (-(-rows // int(specimen.constexprs["BM"])),), arguments, expected, ideal)


def _logit_gradient(specimen: Specimen, inputs: _Inputs) -> Example:
    z, rows = inputs.logits, inputs.rows
    lse = z.logsumexp(1)
    grad = inputs.random(rows)
    onehot = torch.zeros_like(z).scatter_(1, inputs.labels[:rows, None].long(), 1.0)
    expected = torch.full((inputs.tiles * LOGITS.columns, inputs.padded), torch.nan, dtype=torch.float64)
    expected[: inputs.vocab] = 0  # beyond the rows as well
    slope = 1 - (z / SOFTCAP).square()
    expected[: inputs.vocab, :rows] = (grad.double()[:, None] * SCALE * (onehot - z.softmax(1)) * slope).T
    dz = poisoned(inputs.tiles * LOGITS.columns, inputs.padded, dtype=inputs.dtype)
    per_row = {
        "logp_ptr": inputs.filled((onehot * z).sum(1) - lse),
        "lse_ptr": inputs.filled(lse),
        "grad_ptr": inputs.filled(grad),
    }
    arguments = {**inputs.logit_arguments(), **per_row, "dz_ptr": dz, "vocab": inputs.vocab, "first_tile": 0}
    ideal = nbytes(inputs.h, inputs.weight, inputs.bias, inputs.labels, dz, *per_row.values())
    grid = (inputs.padded // LOGITS.rows, inputs.tiles)
    return Example(specimen, grid, arguments, {"dz_ptr": expected}, ideal)


def _head_gradient(specimen: Specimen, inputs: _Inputs) -> Example:
    dz = torch.zeros(inputs.tiles * LOGITS.columns, inputs.padded)
    dz[:, : inputs.rows] = inputs.random(dz.shape[0], inputs.rows)
    dz = dz.to(inputs.dtype)
    dw = poisoned(inputs.vocab, inputs.hidden, dtype=inputs.dtype)
    partial = inputs.random(inputs.vocab, inputs.hidden)
    expected = partial.double() + dz.double()[: inputs.vocab, : inputs.rows] @ inputs.h.double()
    arguments: dict[str, Any] = {"dz_ptr": dz, "h_ptr": inputs.h, "partial_ptr": partial, "dw_ptr": dw}
    ideal = nbytes(*arguments.values())
    arguments |= {"rows": inputs.rows, "vocab": inputs.vocab, "H": inputs.hidden, "padded": inputs.padded}
    arguments |= {"first_tile": 0, "add": 1, "final": 1}
    width, height = int(specimen.constexprs["BH"]), int(specimen.constexprs["BV"])
    grid = (-(-inputs.hidden // width), inputs.tiles * LOGITS.columns // height)
    return Example(specimen, grid, arguments, {"dw_ptr": expected}, ideal)
