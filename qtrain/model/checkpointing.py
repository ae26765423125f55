"""Activation checkpointing under the name that the installed transformers gives it."""

from __future__ import annotations

from transformers import PreTrainedModel


def recompute_activations(model: PreTrainedModel) -> None:
    """Keep a layer's input only, and run the layer again in the backward (not re-entrant)."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:  # transformers before 5.21, the last that serve Python 3.10
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
