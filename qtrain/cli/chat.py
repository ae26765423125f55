"""`qtrain chat`: talk to a run or a base model."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from qtrain.errors import UserError

from .terminal import console


def chat(
    subject: Annotated[
        str,
        typer.Argument(metavar="RUN|MODEL", help="A run directory, or a base model: hub name, folder, demo."),
    ],
    prompt: Annotated[
        str | None,
        typer.Argument(help="Answer this and exit; piped text is taken as well.", show_default=False),
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="System message (default: the run's data.system).")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Cut an answer after so many tokens.")] = 512,
    temperature: Annotated[
        float, typer.Option(min=0.0, max=10.0, help="0: always the likeliest token.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling, where the temperature is above 0.")] = 0,
) -> None:
    """Talk to a run or a base model. /reset forgets, /exit leaves, Ctrl-C stops an answer."""
    from qtrain.evaluation.chat import ChatSettings, answer_once, converse

    piped = None if sys.stdin.isatty() else sys.stdin.read().strip()
    asked = "\n\n".join(part for part in (prompt, piped) if part)
    settings = ChatSettings(system=system, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    if asked:
        answer_once(subject, asked, settings, console())
    elif piped is not None:
        raise UserError(
            "chat: the piped text is empty; give a PROMPT, pipe one in, or start it in a terminal"
        )
    else:
        converse(subject, settings, console())
