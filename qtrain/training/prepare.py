"""From a recipe to everything that a trainer needs, in the order in which mistakes are cheapest."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainingArguments, set_seed

from qtrain.data.dataset import TokenDataset, build_dataset
from qtrain.errors import UserError
from qtrain.kernels.choice import Backend
from qtrain.model.adapter import continue_adapter, new_adapter
from qtrain.model.checkpointing import recompute_activations
from qtrain.model.folder import base_folder, check_trainable
from qtrain.model.kernels import LoraKernels, keep_peft, use_lora_kernels
from qtrain.model.load import Base, load_base, load_tokenizer
from qtrain.model.logprob import logprob_path
from qtrain.recipe.schema import Recipe
from qtrain.runs.rundir import RunDir, finished_run

from .batch import pair_collator, sft_collator
from .distributed import local_rank

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Data:
    """Tokenised rows."""

    train: TokenDataset
    held_out: TokenDataset | None
    tokenizer: Any


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model with its adapter, and how its batches are made."""

    base: Base
    model: PeftModel
    collate: Callable[[list[Any]], dict[str, Any]]
    packed: bool
    shared_prompts: bool
    notes: dict[str, str]  # choice -> reason
    kernels: LoraKernels


def check_request(recipe: Recipe) -> None:
    """What can be refused before anything is read or written.

    Raises:
        UserError: a base with packed weights, an optimizer without its device, a logger that is not
            installed, FSDP for one process.
    """
    if recipe.model.name != "demo":
        check_trainable(recipe.model.name)
    settings = recipe.training
    if settings.optimizer != "adamw" and not torch.cuda.is_available():
        raise UserError(f"training.optimizer is {settings.optimizer}, which needs a CUDA device; use adamw")
    for name in settings.report_to:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"training.report_to names {name}, which is not installed; pip install {name}")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if settings.fsdp and processes == 1:
        raise UserError("training.fsdp needs several processes, this is one; start it with torchrun")


def parent_adapter(recipe: Recipe) -> Path | None:
    """The adapter to continue, or None.

    Raises:
        UserError: the parent is not finished, or it was trained on another base.
    """
    if recipe.parent is None:
        return None
    run = finished_run(recipe.parent)
    from qtrain.recipe.load import load_recipe

    theirs = load_recipe(run.recipe, []).model
    if theirs.name != recipe.model.name:
        raise UserError(
            f"parent: {recipe.parent} was trained on {theirs.name}, "
            f"this run's model.name is {recipe.model.name}; a continued adapter keeps its base"
        )
    return run.adapter


def prepare_data(recipe: Recipe, run: RunDir | None) -> Data:
    """Read, check and tokenise all rows, before the model is loaded.

    Raises:
        UserError: bad rows, each with file and line.
    """
    tokenizer = load_tokenizer(base_folder(recipe.model.name), recipe.model)
    method = recipe.training.method
    bad_rows = run.bad_rows if run is not None else None
    train = build_dataset(
        recipe.data,
        tokenizer,
        method=method,
        files=recipe.data.train,
        limit=recipe.limit,
        bad_rows_path=bad_rows,
    )
    held_out = None
    if recipe.data.eval:
        held_out = build_dataset(
            recipe.data,
            tokenizer,
            method=method,
            files=recipe.data.eval,
            limit=recipe.limit,
            bad_rows_path=run.bad_held_out_rows if run is not None else None,
            split="heldout",
        )
    return Data(train, held_out, tokenizer)


def prepare_model(recipe: Recipe, say: Say) -> Prepared:
    """Load the base, wrap it with a new or continued adapter, and choose how batches are laid out."""
    adapter = parent_adapter(recipe)
    off = recipe.kernels == "off"
    backend: Backend | None = "pytorch" if off else None
    base = load_base(recipe.model, packing=recipe.training.packing, local_rank=local_rank(), backend=backend)
    set_seed(recipe.training.seed)  # the adapter's initial A comes from it
    if adapter is None:
        model = new_adapter(base.model, recipe.adapter)
    else:
        model = continue_adapter(base.model, adapter, recipe.adapter)
    kernels = keep_peft(model) if off else use_lora_kernels(model, base.compute.dtype)
    if use_checkpointing(recipe, base):
        recompute_activations(base.model)
    packed = base.attention.packed
    shared = packed and recipe.dpo.share_prompts and recipe.training.method == "dpo"
    pad = base.tokenizer.pad_token_id
    if recipe.training.method == "dpo":
        collate: Any = pair_collator(packed=packed, share_prompts=shared, pad_token_id=pad)
    else:
        collate = sft_collator(packed=packed, pad_token_id=pad)
    notes = {
        "device": f"{base.compute.device}",
        "compute_dtype": f"{str(base.compute.dtype).removeprefix('torch.')}: {base.compute.reason}",
        "attention": f"{base.attention.implementation}: {base.attention.reason}",
        "linear_logprob": logprob_path(base.model, backend),
        "lora_linear": kernels.summary(),
    }
    for choice, reason in notes.items():
        say(f"{choice}: {reason}")
    return Prepared(base, model, collate, packed, shared, notes, kernels)


def use_checkpointing(recipe: Recipe, base: Base) -> bool:
    """Recompute activations in the backward: as asked, or on CUDA, where memory is short."""
    asked = recipe.training.gradient_checkpointing
    return base.compute.device.type == "cuda" if asked == "auto" else bool(asked)


def training_arguments(recipe: Recipe, run: RunDir, base: Base) -> TrainingArguments:
    """The recipe in the words of transformers."""
    settings = recipe.training
    cuda = base.compute.device.type == "cuda"
    dtype = str(base.compute.dtype)
    return TrainingArguments(
        output_dir=str(run.checkpoints),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(settings.schedule, settings.schedule),
        warmup_steps=settings.warmup_ratio,
        weight_decay=settings.weight_decay,
        optim={
            "adamw": "adamw_torch",
            "adamw_8bit": "adamw_bnb_8bit",
            "paged_adamw_8bit": "paged_adamw_8bit",
            "paged_adamw_32bit": "paged_adamw_32bit",
        }[settings.optimizer],
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        data_seed=settings.seed,
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=settings.save_every,
        eval_strategy="steps" if settings.eval_every and recipe.data.eval else "no",
        eval_steps=settings.eval_every,
        report_to=list(settings.report_to) or "none",
        run_name=run.path.name,
        use_cpu=not cuda,
        bf16=cuda and dtype == "torch.bfloat16",
        fp16=cuda and dtype == "torch.float16",
        fsdp="full_shard" if settings.fsdp else "",
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        dataloader_pin_memory=cuda,
        disable_tqdm=True,
        accelerator_config={"use_seedable_sampler": True},
    )
