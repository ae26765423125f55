"""`qtrain run --dry-run`: what would be trained on what, with nothing trained."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.syntax import Syntax
from rich.text import Text

from qtrain.data.dataset import TokenDataset
from qtrain.data.template import EncodedExample, EncodedPair
from qtrain.model.adapter import new_adapter
from qtrain.model.devices import choose_compute
from qtrain.model.folder import base_folder
from qtrain.model.load import parameter_counts
from qtrain.recipe.load import dump_recipe
from qtrain.recipe.schema import Recipe
from qtrain.training.prepare import check_request, parent_adapter, prepare_data

SUPERVISED = "black on green"
REJECTED = "white on red"
_SHOWN_TOKENS = 600


def show(recipe: Recipe, console: Console) -> None:
    """Validate recipe and rows and print what the run would be.

    Raises:
        UserError: whatever would stop the run.
    """
    check_request(recipe)
    parent_adapter(recipe)
    data = prepare_data(recipe, None)
    for name, rows in (("training rows", data.train), ("held-out rows", data.held_out)):
        if rows is not None:
            console.rule(name)
            for line in rows.report.lines():
                console.print(line, highlight=False, markup=False, soft_wrap=True)
    _examples(data.train, data.tokenizer, console)
    console.rule("recipe")
    console.print(Syntax(dump_recipe(recipe), "yaml", theme="ansi_dark", background_color="default"))
    console.rule("model")
    trainable, total = count_parameters(recipe)
    compute = choose_compute(recipe.model)
    steps = planned_steps(recipe, len(data.train))
    dtype = str(compute.dtype).removeprefix("torch.")
    batch = f"{recipe.training.batch_size} x {recipe.training.gradient_accumulation} rows"
    console.print(
        f"trainable parameters: {trainable:,} of {total:,} ({trainable / total:.2%})\n"
        f"device: {compute.device}, compute in {dtype}: {compute.reason}\n"
        f"optimizer steps: {steps} of {batch}\n"
        f"run directory: {recipe.out} (not made)\n"
        "nothing was trained",
        highlight=False,
        markup=False,
    )


def planned_steps(recipe: Recipe, rows: int, processes: int = 1) -> int:
    """Optimizer steps of the run."""
    settings = recipe.training
    batches = -(-rows // (settings.batch_size * processes))
    an_epoch = max(-(-batches // settings.gradient_accumulation), 1)
    return settings.max_steps or -int(-(settings.epochs * an_epoch) // 1)


def count_parameters(recipe: Recipe) -> tuple[int, int]:
    """(trainable, all) parameters, from the model's configuration alone: no weight is read."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(
        base_folder(recipe.model.name),
        revision=recipe.model.revision,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.model.trust_remote_code)
    model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.device("meta"):
        return parameter_counts(new_adapter(model, recipe.adapter))


def _examples(rows: TokenDataset, tokenizer: Any, console: Console) -> None:
    console.rule("examples as the model sees them")
    legend = Text("supervised", style=SUPERVISED) + Text(" tokens are learnt, the others are only read")
    console.print(legend)
    for number in range(min(3, len(rows))):
        item = rows[number]
        body = _pair(item, tokenizer) if isinstance(item, EncodedPair) else _example(item, tokenizer)
        console.print(Panel(body, title=str(item.source), title_align="left"))


def _example(item: EncodedExample, tokenizer: Any) -> Text:
    return _tokens(item.input_ids, [SUPERVISED if flag else "" for flag in item.supervised], tokenizer)


def _pair(item: EncodedPair, tokenizer: Any) -> Text:
    text = _tokens(item.prompt_ids, [""] * len(item.prompt_ids), tokenizer)
    for name, ids, style in (
        ("chosen", item.chosen_ids, SUPERVISED),
        ("rejected", item.rejected_ids, REJECTED),
    ):
        text += Text(f"\n[{name}] ", style="bold") + _tokens(ids, [style] * len(ids), tokenizer)
    return text


def _tokens(ids: list[int], styles: list[str], tokenizer: Any) -> Text:
    """Runs of one style are decoded together: a token of its own can be half a character."""
    text = Text()
    start = 0
    shown = min(len(ids), _SHOWN_TOKENS)
    for place in range(1, shown + 1):
        if place == shown or styles[place] != styles[start]:
            text.append(
                tokenizer.decode(ids[start:place], clean_up_tokenization_spaces=False), style=styles[start]
            )
            start = place
    if shown < len(ids):
        text.append(f" ... {len(ids) - shown} more tokens", style="dim")
    return text
