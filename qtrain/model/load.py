"""Loading a base model: 4-bit NF4 through bitsandbytes or 16-bit, frozen, ready for an adapter."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from qtrain.errors import UserError
from qtrain.export.completeness import first_of
from qtrain.export.tensors import shape_text
from qtrain.export.unpacked_model import unpacked_model
from qtrain.kernels.choice import Backend
from qtrain.recipe.schema import ModelSettings

from .attention import AttentionChoice, choose_attention
from .devices import Compute, choose_compute
from .folder import base_folder, base_on_disk, check_trainable, packed_as
from .logprob import attach_logprob_forward


@dataclass(frozen=True, slots=True)
class Base:
    """A loaded base model and the choices made for it."""

    model: PreTrainedModel
    tokenizer: Any
    folder: str  # local folder or hub name that it was loaded from
    compute: Compute
    attention: AttentionChoice


def load_tokenizer(folder: str, settings: ModelSettings) -> Any:
    """The tokenizer of a base model, with a pad token (padding is masked by position, so any will do).

    Raises:
        UserError: no such folder or hub name, or it has no tokenizer's files.
    """
    with _loading(folder):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes of config.json alone
        raise UserError(
            f"model.name: {folder} holds no tokenizer's vocabulary (tokenizer.json, say); "
            "copy the tokenizer's files of the model there"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(
    settings: ModelSettings,
    *,
    packing: bool = True,
    local_rank: int = 0,
    backend: Backend | None = None,
    unpack: bool = False,
) -> Base:
    """Load and freeze the base model; its forward can return label log-probs (by `backend`, if given).

    Args:
        unpack: take packed weights (GPTQ, AWQ, compressed-tensors) too, unpacked; not to be trained on.

    Raises:
        UserError: no such model, it can't be read, or its weights are packed.
    """
    folder = base_folder(settings.name)
    compute = choose_compute(settings, local_rank)
    tokenizer = load_tokenizer(folder, settings)
    with _loading(folder):
        config = AutoConfig.from_pretrained(
            folder, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
        attention = choose_attention(settings, config, packing)
        model = _load_model(folder, config, settings, compute, attention, unpack=unpack)
    freeze(model)
    keep_nf4_layout(model)
    attach_logprob_forward(model, backend)
    return Base(model, tokenizer, folder, compute, attention)


def _load_model(
    folder: str,
    config: Any,
    settings: ModelSettings,
    compute: Compute,
    attention: AttentionChoice,
    *,
    unpack: bool,
) -> Any:
    if not unpack:
        check_trainable(folder, config.to_dict())
    if packed_as(Path(folder), config.to_dict()) is None:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
            dtype=compute.dtype,
            device_map={"": compute.device},
            attn_implementation=attention.implementation,
            quantization_config=_quantization(settings, compute),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told of below, in a line
        )
        _check_loaded(folder, model, found)
        if compute.device.type == "cpu":
            detach_from_files(model)
        return model
    model = unpacked_model(base_on_disk(settings), compute.dtype, compute.device)
    model.set_attn_implementation(attention.implementation)
    return model


def _check_loaded(folder: str, model: nn.Module, found: dict[str, Any]) -> None:
    """Refuse a model that transformers filled up with random weights where the files had none that fit."""
    for name, stored, expected in [*found["mismatched_keys"], *_mismatched_nf4(model)]:
        raise UserError(
            f"model.name: {name} of {folder} is {shape_text(stored)}, and {shape_text(expected)} by "
            "config.json; get the model again"
        )
    missing = sorted(found["missing_keys"])
    if missing:
        raise UserError(f"model.name: {folder} holds no {first_of(missing)}; get the model again")


def _mismatched_nf4(model: nn.Module) -> Iterator[tuple[str, Sequence[int], Sequence[int]]]:
    """4-bit weights of another shape than their module's, which transformers 5.24 does not look for."""
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and tuple(state.shape) != (module.out_features, module.in_features):
            yield f"{name}.weight", tuple(state.shape), (module.out_features, module.in_features)


def _quantization(settings: ModelSettings, compute: Compute) -> BitsAndBytesConfig | None:
    if settings.quantization == "none":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=settings.double_quant,
        bnb_4bit_compute_dtype=compute.dtype,
    )


def freeze(model: nn.Module) -> None:
    """Only the adapter learns."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def detach_from_files(model: nn.Module) -> None:
    """Copy weights that are mapped from the checkpoint's files into memory of the process.

    A mapped weight changes when its file does, and is read from disk in the middle of the first step.
    """
    for parameter in model.parameters():
        if getattr(parameter, "quant_state", None) is None:
            parameter.data = parameter.data.clone()


def keep_nf4_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on CPUs with avx512_bf16.

    Its first forward in eval mode would rewrite every `Linear4bit` in place into a layout that has no
    backward: after an evaluation, training would crash or silently stop learning.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


@contextlib.contextmanager
def _loading(folder: str) -> Iterator[None]:
    """No progress bars of transformers' own, and one line for a model that can't be had."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        yield
    except SafetensorError as error:
        raise UserError(
            f"model.name: a weight file of {folder} is damaged ({_first_line(error)}); get the model again"
        ) from error
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        remedy = "" if Path(folder).is_dir() else "; check the name and the network, or give a local folder"
        raise UserError(f"model.name: {folder} can't be loaded: {_first_line(error)}{remedy}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, KeyError) or not lines:
        return " ".join([type(error).__name__, *lines])
    return " ".join(lines) if lines[0].endswith(":") else lines[0]


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; a packed 4-bit weight counts as the weights that it holds."""
    trainable = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        count = parameter.numel() if state is None else int(torch.Size(state.shape).numel())
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total
