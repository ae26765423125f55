"""lora_linear inside of peft's layers: the same numbers where it is plain LoRA, peft's forward elsewhere."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from qtrain.model import lora_layers, shared_input
from qtrain.model.kernels import LoraKernels, keep_peft, use_lora_kernels
from qtrain.model.load import load_base
from qtrain.recipe.schema import ModelSettings
from tests.qtrain.tiny import save_tiny_base

ATTENTION = ("q_proj", "k_proj", "v_proj")


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Widths of 64 and 128: bitsandbytes' own decode is wrong on a CPU where blocks straddle rows."""
    return save_tiny_base(
        tmp_path_factory.mktemp("base"), hidden_size=64, intermediate_size=128, num_hidden_layers=1
    )


def _model(folder: Path, quantization: str = "nf4", **lora: Any) -> Any:
    settings = ModelSettings.model_validate(
        {"name": str(folder), "quantization": quantization, "compute_dtype": "fp32"}
    )
    torch.manual_seed(0)
    model = get_peft_model(
        load_base(settings).model,
        LoraConfig(r=4, lora_alpha=8, **({"target_modules": "all-linear"} | lora)),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def _ids() -> Tensor:
    return torch.arange(3, 27).view(2, 12)


def _gradients(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logits = model(input_ids=_ids()).logits
    (logits * torch.linspace(0, 1, logits.shape[-1])).sum().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _attention(model: Any) -> Any:
    return model.base_model.model.model.layers[0].self_attn


def _same(ours: Any, theirs: Any) -> None:
    # fp32 on both sides, the products added up in another order
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@contextmanager
def _op_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many layers each call of the op served."""
    counts: list[int] = []
    plain = lora_layers.lora_linear_group

    def counting(x: Tensor, weights: Any, *args: Any, **kwargs: Any) -> Any:
        counts.append(len(weights))
        return plain(x, weights, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(lora_layers, "lora_linear_group", counting)
        yield counts


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_same_outputs_and_gradients_as_peft(
    base_folder: Path, quantization: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(base_folder, quantization).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    logits, gradients = _gradients(model)
    table = use_lora_kernels(model, torch.float32)
    with _op_calls(monkeypatch) as calls:
        our_logits, our_gradients = _gradients(model)
    assert calls == [3, 1, 2, 1] * (2 if checkpointing else 1)
    _same(our_logits, logits)
    assert our_gradients.keys() == gradients.keys()
    _same(our_gradients, gradients)
    assert not table.fallbacks


def test_dropout_is_applied_in_training_and_repeated_in_recomputation(base_folder: Path) -> None:
    model = _model(base_folder, lora_dropout=0.5)
    use_lora_kernels(model, torch.float32)
    plain = model.eval()(input_ids=_ids()).logits
    assert torch.equal(plain, model(input_ids=_ids()).logits)
    model.train()
    torch.manual_seed(3)
    dropped, gradients = _gradients(model)
    assert not torch.allclose(dropped, plain, atol=1e-3)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    torch.manual_seed(3)
    again, recomputed = _gradients(model)
    assert torch.equal(again, dropped)
    _same(recomputed, gradients)


def test_table_says_who_serves_what(base_folder: Path) -> None:
    model = _model(base_folder, target_modules=["q_proj", "v_proj", "o_proj"])
    table = use_lora_kernels(model, torch.float32)
    assert table.summary() == ("3 layers pytorch: NF4 base, cpu tensors; one input for q_proj + v_proj"), (
        table.summary()
    )
    texts = table.as_dict()
    assert len(texts) == 3
    assert texts["base_model.model.model.layers.0.self_attn.o_proj"] == "pytorch: NF4 base, cpu tensors"
    off = keep_peft(_model(base_folder, target_modules=["q_proj"]))
    assert off.summary() == "1 layers peft: kernels is off"


def _disable(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def _second_adapter(model: Any) -> None:
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear"))
    model.base_model.set_adapter(["default", "other"])


def _hook(model: Any) -> None:
    for layer in _lora(model):
        layer.base_layer.register_forward_hook(lambda *_: None)


def _lora(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_disable, "the adapter is switched off"),
        (_second_adapter, "2 adapters are active"),
        (_hook, "its base_layer has hooks"),
        (lambda model: model.merge_adapter(), "the adapter is merged into the base"),
    ],
)
def test_what_the_op_does_not_know_goes_to_peft(
    base_folder: Path, change: Callable[[Any], None], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(base_folder, "none").eval()
    table = use_lora_kernels(model, torch.float32)
    change(model)
    plain = copy.deepcopy(model)
    for layer in _lora(plain):
        del layer.forward
    with torch.no_grad(), _op_calls(monkeypatch) as calls:
        assert torch.equal(model(input_ids=_ids()).logits, plain(input_ids=_ids()).logits)
    assert not calls
    assert {text: len(layers) for text, layers in table.fallbacks.items()} == {reason: 7}


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        ({"use_dora": True}, "DoraLinearVariant"),
        ({"lora_bias": True}, "lora_B has a bias"),
    ],
)
def test_other_adapters_are_peft_s_from_the_start(base_folder: Path, lora: Any, reason: str) -> None:
    model = _model(base_folder, "none", **lora)
    table = use_lora_kernels(model, torch.float32)
    assert all(path.path == "peft" and reason in path.reason for path in table.layers.values())
    model(input_ids=_ids())
    assert not table.fallbacks  # nothing was promised


def test_a_copy_is_patched_on_its_own(base_folder: Path) -> None:
    model = _model(base_folder)
    use_lora_kernels(model, torch.float32)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(input_ids=_ids()).logits, model(input_ids=_ids()).logits)
    with torch.no_grad():
        for layer in _lora(twin):
            layer.lora_B["default"].weight.zero_()
    assert not torch.equal(twin(input_ids=_ids()).logits, model(input_ids=_ids()).logits)


class Block(nn.Module):
    """Its three layers are called by the test."""

    def __init__(self) -> None:
        super().__init__()
        for name in ATTENTION:
            setattr(self, name, nn.Linear(8, 8))

    def forward(self, calls: Callable[[Block], Any]) -> Any:
        return calls(self)


@pytest.fixture
def block() -> tuple[Any, LoraKernels, Any]:
    """A patched block, and an unpatched copy."""
    torch.manual_seed(0)
    model = get_peft_model(Block(), LoraConfig(r=2, target_modules=list(ATTENTION), init_lora_weights=False))
    plain = copy.deepcopy(model)
    return model.base_model.model, use_lora_kernels(model, torch.float32), plain.base_model.model


def test_results_are_never_stale(block: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_input, "MISSES", 100)
    ours, _, plain = block
    x, y = torch.randn(5, 8), torch.randn(5, 8)

    def write(target: Any) -> None:
        with torch.no_grad():
            target.v_proj.lora_B["default"].weight.add_(1.0)

    def calls(b: Any) -> list[Tensor]:
        own = x.clone()
        found = [b.k_proj(own), b.q_proj(own), b.v_proj(own)]  # any order
        found += [b.q_proj(own), b.v_proj(y), b.k_proj(own)]  # another tensor in between
        found.append(b.q_proj(own))
        own.add_(1.0)  # x is another now
        found.append(b.v_proj(own))
        found += [b.q_proj(own), b.k_proj(own), b.q_proj(own)]
        write(b)  # the layer is another now
        found.append(b.v_proj(own))
        with torch.no_grad():
            found.append(b.q_proj(own))
        found.append(b.k_proj(own))  # under grad mode again
        return found

    mine, theirs = ours(calls), plain(calls)
    _same(mine, theirs)
    assert [t.requires_grad for t in mine] == [t.requires_grad for t in theirs]


def test_layers_with_inputs_of_their_own_stop_being_a_group(
    block: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cross attention: k and v read another tensor than q. Nothing is wrong, but work would be in vain."""
    ours, _, plain = block
    x, memory = torch.randn(5, 8), torch.randn(3, 8)

    def calls(b: Any) -> list[Tensor]:
        return [b.q_proj(x), b.k_proj(memory), b.v_proj(memory)]

    with _op_calls(monkeypatch) as counts:
        for _ in range(shared_input.MISSES + 2):
            _same(ours(calls), plain(calls))
    assert counts[:2] == [3, 3]
    assert counts[-3:] == [1, 1, 1]


def test_nothing_waits_when_the_block_is_left(block: Any) -> None:
    ours, _, _ = block
    x = torch.randn(5, 8)

    def fail(b: Any) -> Tensor:
        b.q_proj(x)
        raise RuntimeError("in between")

    group = ours.q_proj.__dict__["_shared_input"]
    ours(lambda b: b.q_proj(x))
    assert (group._waiting, group._x) == ({}, None)
    with pytest.raises(RuntimeError, match="in between"):
        ours(fail)
    assert (group._waiting, group._x) == ({}, None)


def test_nothing_is_kept_after_the_last_one_is_taken(block: Any) -> None:
    ours, _, _ = block

    def calls(b: Any) -> tuple[Any, ...]:
        x = torch.randn(5, 8)
        outputs = [b.q_proj(x), b.k_proj(x), b.v_proj(x)]
        kept = (weakref.ref(x), *(weakref.ref(output) for output in outputs))
        del x, outputs
        gc.collect()
        return tuple(reference() for reference in kept)  # while the block still runs

    with torch.no_grad():
        assert ours(calls) == (None,) * 4
