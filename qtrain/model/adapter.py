"""The LoRA adapter: a new one, or the one that a parent run left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from qtrain.errors import UserError
from qtrain.recipe.schema import AdapterSettings


def new_adapter(model: PreTrainedModel, settings: AdapterSettings) -> PeftModel:
    """Wrap the base with a fresh adapter, B = 0, so that it starts as the base.

    Raises:
        UserError: no linear layer has one of the target names.
    """
    targets = settings.target_modules
    if isinstance(targets, list):
        _check_targets(model, targets)
    config = LoraConfig(
        r=settings.r,
        lora_alpha=int(settings.alpha) if settings.alpha.is_integer() else settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        use_rslora=settings.rslora,
        bias="none",
        task_type="CAUSAL_LM",
    )
    return _in_fp32(get_peft_model(model, config))


def continue_adapter(model: PreTrainedModel, folder: Path, settings: AdapterSettings) -> PeftModel:
    """Load an adapter to train it further: the shape (r, targets) is its own, the dropout the recipe's.

    Raises:
        UserError: the folder holds no adapter, or one of another shape than the base or the recipe.
    """
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"parent: {folder} holds no adapter_config.json; give a finished run")
    config: Any = PeftConfig.from_pretrained(str(folder))
    if config.r != settings.r:
        raise UserError(
            f"adapter.r is {settings.r} but the parent's adapter has r={config.r}; "
            "a continued adapter keeps its shape"
        )
    config.lora_dropout = settings.dropout
    try:
        wrapped = PeftModel.from_pretrained(model, str(folder), is_trainable=True, config=config)
    except RuntimeError as error:
        raise UserError(f"parent: the adapter in {folder} does not fit this base model: {error}") from error
    return _in_fp32(wrapped)


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Load an adapter for inference.

    Raises:
        UserError: the folder holds no adapter, or it does not fit the base.
    """
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} holds no adapter_config.json; give a finished run or a base model")
    try:
        return PeftModel.from_pretrained(model, str(folder))
    except RuntimeError as error:
        raise UserError(f"the adapter in {folder} does not fit this base model: {error}") from error


def _check_targets(model: nn.Module, targets: list[str]) -> None:
    linear = {
        name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    missing = [target for target in targets if target not in linear]
    if missing:
        raise UserError(
            f"adapter.target_modules: no linear layer is called {', '.join(missing)}; this model has "
            f"{', '.join(sorted(linear))} (or all-linear)"
        )


def _in_fp32(model: PeftModel) -> PeftModel:
    """Adapter weights in fp32 whatever the compute dtype: in bf16, small steps would be rounded away."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    return model
