"""Cases for the LoRA linear layer: inputs, the float64 truth, and the plain op of the same dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from qtrain.kernels import lora_linear_group, reference
from qtrain.kernels.nf4 import NF4Weight, dequantize

Gradients = dict[str, Tensor]


def philox_keep(seed: int, rows: int, columns: int, dropout_p: float) -> Tensor:
    """The mask as `dropout_triton.py` defines it, from Philox4x32-10 written down a second time, in numpy."""
    group, row = np.meshgrid(np.arange(columns // 4), np.arange(rows))
    counter = [group.astype(np.uint64), row.astype(np.uint64), np.zeros_like(row, np.uint64)]
    counter.append(counter[2].copy())
    key = [seed & 0xFFFFFFFF, seed >> 32]
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        first, second = counter[0] * np.uint64(0xD2511F53), counter[2] * np.uint64(0xCD9E8D57)
        counter = [
            (second >> np.uint64(32)) ^ counter[1] ^ np.uint64(key[0]),
            second & low,
            (first >> np.uint64(32)) ^ counter[3] ^ np.uint64(key[1]),
            first & low,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    bits = np.stack(counter, axis=-1).reshape(rows, columns)
    return torch.from_numpy((bits >> np.uint64(1)) >= round(dropout_p * 2**31))


def nf4_weight(rows: int, columns: int, *, nested: bool, generator: torch.Generator) -> NF4Weight:
    """A random weight, quantised by bitsandbytes."""
    from bitsandbytes.nn import Params4bit

    dense = torch.randn(rows, columns, generator=generator) / columns**0.5
    packed = Params4bit(
        dense.bfloat16(), requires_grad=False, compress_statistics=nested, quant_type="nf4"
    ).to("cpu")
    return NF4Weight.from_params4bit(packed)


@dataclass(frozen=True)
class Case:
    """Arguments of `lora_linear_group`, and the gradients of its outputs."""

    x: Tensor
    weights: list[Tensor | NF4Weight]
    lora_As: list[Tensor]
    lora_Bs: list[Tensor]
    scalings: list[float]
    biases: list[Tensor | None]
    dys: list[Tensor]
    dropout_p: float
    seed: int

    def keep(self) -> Tensor:
        """The dropout mask, [M, K]."""
        if self.dropout_p == 0:
            return torch.ones(self.x.shape, dtype=torch.bool)
        return philox_keep(self.seed, *self.x.shape, self.dropout_p)


def make_case(
    rows: int,
    columns: Sequence[int],
    inner: int,
    ranks: Sequence[int],
    *,
    base: str,
    dtype: torch.dtype,
    dropout_p: float = 0.0,
    bias: bool = True,
    seed: int = 0,
) -> Case:
    """`base` is `nf4 nested`, `nf4` or `16-bit`; a layer for each of `columns` (its N) and `ranks`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weights: list[Tensor | NF4Weight] = []
    for n in columns:
        weight = nf4_weight(n, inner, nested=base == "nf4 nested", generator=generator)
        weights.append(dequantize(weight, dtype, triton=False) if base == "16-bit" else weight)
    return Case(
        x=normal(rows, inner).to(dtype),
        weights=weights,
        lora_As=[normal(r, inner) / inner**0.5 for r in ranks],
        lora_Bs=[normal(n, r) / r**0.5 for n, r in zip(columns, ranks, strict=True)],
        scalings=[0.5 + index for index in range(len(ranks))],
        biases=[normal(n).to(dtype) if bias else None for n in columns],
        dys=[normal(rows, n).to(dtype) for n in columns],
        dropout_p=dropout_p,
        seed=(seed << 32) + 0x9ABCDEF0,  # both words of the key are used
    )


def run(case: Case) -> Gradients:
    """Outputs and gradients of the public op under whatever backend is in force."""
    x = case.x.clone().requires_grad_()
    lora_As = [a.clone().requires_grad_() for a in case.lora_As]
    lora_Bs = [b.clone().requires_grad_() for b in case.lora_Bs]
    ys = lora_linear_group(
        x,
        case.weights,
        lora_As,
        lora_Bs,
        case.scalings,
        biases=case.biases,
        dropout_p=case.dropout_p,
        seed=case.seed if case.dropout_p else None,
    )
    grads = torch.autograd.grad(list(ys), [x, *lora_As, *lora_Bs], case.dys)
    return _named([y.detach() for y in ys], grads)


def exact(case: Case) -> Gradients:
    """In float64."""
    return _plain(case, torch.float64)


def naive(case: Case) -> Gradients:
    """Plain PyTorch, every product in the dtype of x."""
    return _plain(case, case.x.dtype)


def magnitude(case: Case) -> Gradients:
    """The sums of every result with all terms positive: what rounding errors are relative to."""
    positive = replace(
        case,
        x=case.x.abs(),
        weights=[_dense(weight, case.x.dtype).abs() for weight in case.weights],
        lora_As=[a.abs() for a in case.lora_As],
        lora_Bs=[b.abs() for b in case.lora_Bs],
        biases=[None if bias is None else bias.abs() for bias in case.biases],
        dys=[dy.abs() for dy in case.dys],
    )
    return _plain(positive, torch.float64)


def _dense(weight: Tensor | NF4Weight, dtype: torch.dtype) -> Tensor:
    return dequantize(weight, dtype, triton=False) if isinstance(weight, NF4Weight) else weight


def _plain(case: Case, dtype: torch.dtype) -> Gradients:
    x = case.x.to(dtype).requires_grad_()
    lora_As = [a.to(dtype).requires_grad_() for a in case.lora_As]
    lora_Bs = [b.to(dtype).requires_grad_() for b in case.lora_Bs]
    keep = case.keep().to(dtype)
    ys = []
    for index, weight in enumerate(case.weights):
        # the decode is exact: both take the weight as it is in the low dtype
        dense = _dense(weight, case.x.dtype)
        bias = case.biases[index]
        ys.append(
            reference.lora_linear(
                x,
                dense.to(dtype),
                lora_As[index],
                lora_Bs[index],
                case.scalings[index],
                bias=None if bias is None else bias.to(dtype),
                dropout_p=case.dropout_p,
                keep=keep,
            )
        )
    grads = torch.autograd.grad(ys, [x, *lora_As, *lora_Bs], [dy.to(dtype) for dy in case.dys])
    return _named([y.detach() for y in ys], grads)


def _named(ys: Sequence[Tensor], grads: Sequence[Tensor]) -> Gradients:
    found = {f"y[{index}]": y.double() for index, y in enumerate(ys)}
    found["dx"] = grads[0].double()
    count = (len(grads) - 1) // 2
    for index in range(count):
        found[f"dA[{index}]"] = grads[1 + index].double()
        found[f"dB[{index}]"] = grads[1 + count + index].double()
    return found


def assert_no_less_exact(case: Case, ours: Gradients, roundings: float) -> None:
    """Error <= that of the plain op + `roundings` roundings of the largest value, in the dtype of x.

    What may be rounded once more than in the plain op: scaling B before the product, the low-rank
    intermediates xa and g, and the running sum of a group's dx, once for each layer. Sums in fp32 add
    two of its roundings of the terms, which may be larger than what is left of them.
    """
    true, plain, terms = exact(case), naive(case), magnitude(case)
    for name, value in ours.items():
        assert torch.isfinite(value).all(), f"{name} is not finite"
        mine = (value - true[name]).abs().max()
        other = (plain[name] - true[name]).abs().max()
        slack = roundings * torch.finfo(case.x.dtype).eps / 2 * true[name].abs().max()
        slack += 2 * torch.finfo(torch.float32).eps * terms[name].max()
        assert mine <= other + slack, f"{name}: error {mine:.3g}, plain op {other:.3g}, slack {slack:.3g}"
