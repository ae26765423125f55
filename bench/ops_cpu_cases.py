"""What `ops_cpu` measures: an op of ours and what it stands in for, on the same tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtrain.kernels import NF4Weight, linear_logprob, lora_linear_group

RANK, ALPHA, DROPOUT = 64, 128, 0.05

# inner width and outer widths of the layers that share an input: Qwen2.5's own
WIDTHS = {
    "0.5B": {"hidden": 896, "kv": 128, "mlp": 4864},
    "1.5B": {"hidden": 1536, "kv": 256, "mlp": 8960},
}
TOLERANCE = {torch.bfloat16: 0.02, torch.float32: 1e-4}  # relative, of a whole tensor: some ten roundings


@dataclass(frozen=True, slots=True)
class Case:
    """Two callables that do forward and backward and return what is to agree.

    `gate` runs both without dropout, whose masks differ.
    """

    name: str
    theirs_name: str
    dtype: torch.dtype
    ours: Callable[[], Sequence[Tensor]]
    theirs: Callable[[], Sequence[Tensor]]
    gate: Callable[[], tuple[Sequence[Tensor], Sequence[Tensor]]]

    def check(self) -> float:
        """The largest relative difference between the two.

        Raises:
            RuntimeError: it is more than roundings explain.
        """
        ours, theirs = self.gate()
        pairs = zip(ours, theirs, strict=True)
        worst = max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)
        if not worst < TOLERANCE[self.dtype]:
            raise RuntimeError(f"{self.name}: results differ by {worst:.2g}; no speed is reported")
        return worst


class _Block(nn.Module):
    """Layers that share their input."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.is_loaded_in_4bit = True  # peft's sign for bitsandbytes layers
        for name, layer in layers.items():
            setattr(self, name, layer)


def _quantised_layer(inner: int, outer: int, bias: bool, dtype: torch.dtype) -> Any:
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer = Linear4bit(inner, outer, bias=bias, compute_dtype=dtype, quant_type="nf4")
    weight = torch.randn(outer, inner) / inner**0.5
    layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
    layer = layer.to("cpu")
    layer.support_avx512bf16_for_cpu = False  # its repacked layout has no backward
    if bias:
        layer.bias = nn.Parameter(torch.randn(outer, dtype=dtype), requires_grad=False)
    return layer


def lora_case(
    name: str, inner: int, outers: dict[str, int], bias: bool, rows: int, dtype: torch.dtype
) -> Case:
    """LoRA layers on an NF4 base: peft's modules over bitsandbytes against one `lora_linear_group`."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    block = _Block({child: _quantised_layer(inner, outer, bias, dtype) for child, outer in outers.items()})
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=DROPOUT,
        target_modules=list(outers),
        init_lora_weights=False,
    )
    model = get_peft_model(block, config).train()
    layers = [getattr(model.base_model.model, child) for child in outers]
    lora_As = [layer.lora_A["default"].weight for layer in layers]
    lora_Bs = [layer.lora_B["default"].weight for layer in layers]
    weights = [NF4Weight.from_params4bit(layer.base_layer.weight) for layer in layers]
    x = torch.randn(rows, inner, dtype=dtype).requires_grad_()
    dys = [torch.randn(rows, outer, dtype=dtype) for outer in outers.values()]

    def finish(ys: Sequence[Tensor]) -> list[Tensor]:
        grads = torch.autograd.grad(list(ys), [x, *lora_As, *lora_Bs], dys)
        return [*(y.detach() for y in ys), *grads]

    def ours(dropout_p: float = DROPOUT) -> list[Tensor]:
        biases = [layer.base_layer.bias for layer in layers]
        scalings = [ALPHA / RANK] * len(layers)
        return finish(
            lora_linear_group(x, weights, lora_As, lora_Bs, scalings, biases=biases, dropout_p=dropout_p)
        )

    def theirs() -> list[Tensor]:
        return finish([layer(x) for layer in layers])

    def gate() -> tuple[list[Tensor], list[Tensor]]:
        model.eval()
        try:
            return ours(0.0), theirs()
        finally:
            model.train()

    return Case(name, "peft + bitsandbytes", dtype, ours, theirs, gate)


def lora_cases(model: str, rows: int, dtype: torch.dtype) -> Iterator[Case]:
    """The linear layers of a decoder layer, alone and as the groups that share an input."""
    width = WIDTHS[model]
    hidden, kv, mlp = width["hidden"], width["kv"], width["mlp"]
    for name, inner, outers, bias in (
        ("q", hidden, {"q_proj": hidden}, True),
        ("v", hidden, {"v_proj": kv}, True),
        ("gate", hidden, {"gate_proj": mlp}, False),
        ("down", mlp, {"down_proj": hidden}, False),
        ("q+k+v", hidden, {"q_proj": hidden, "k_proj": kv, "v_proj": kv}, True),
        ("gate+up", hidden, {"gate_proj": mlp, "up_proj": mlp}, False),
    ):
        yield lora_case(f"{model} {name} M={rows}", inner, outers, bias, rows, dtype)


def logprob_case(rows: int, hidden: int, vocab: int, dtype: torch.dtype) -> Case:
    """Label log-probs under a frozen head: materialised logits and log_softmax against `linear_logprob`."""
    torch.manual_seed(0)
    weight = torch.randn(vocab, hidden, dtype=dtype) / hidden**0.5
    h = torch.randn(rows, hidden, dtype=dtype).requires_grad_()
    labels = torch.randint(vocab, (rows,))

    def finish(logp: Tensor) -> list[Tensor]:
        return [logp.detach(), *torch.autograd.grad(logp.sum(), [h])]

    def ours() -> list[Tensor]:
        return finish(cast(Tensor, linear_logprob(h, weight, labels)))

    def theirs() -> list[Tensor]:
        logp = F.linear(h, weight).float().log_softmax(dim=-1)
        return finish(logp.gather(1, labels.unsqueeze(1)).squeeze(1))

    name = f"linear_logprob T={rows} H={hidden} V={vocab}"
    return Case(name, "logits + log_softmax", dtype, ours, theirs, lambda: (ours(), theirs()))
