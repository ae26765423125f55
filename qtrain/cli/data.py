"""`qtrain data check`: what is wrong with a data file, before anything is trained on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .terminal import console

if TYPE_CHECKING:
    from rich.console import Console

    from qtrain.data.check import FileCheck, Finding
    from qtrain.data.template import ChatEncoder

app = typer.Typer(help="Look into data files.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Look into data files."""


@app.command()
def check(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Files, hub names, or `demo`.")],
    max_length: Annotated[int, typer.Option(min=8, help="Tokens that a row may have.")] = 2048,
    model: Annotated[
        str | None, typer.Option(help="Count tokens as this model does: hub name, folder, or `demo`.")
    ] = None,
    format: Annotated[str, typer.Option(help="The rows' format, if it is not to be detected.")] = "auto",
    reasoning: Annotated[str, typer.Option(help="`think`, `plain` or `drop`, as data.reasoning.")] = "think",
    chat_template: Annotated[
        str | None, typer.Option(help="`chatml` or a Jinja file, as data.chat_template.")
    ] = None,
) -> None:
    """Report every bad row, duplicates, lengths, and mixes. Exit code 1 when something is wrong."""
    from qtrain.data.check import DataCheck

    settings = _settings(format, max_length, reasoning, chat_template)
    out = console()
    encoder = None if model is None else _encoder(model, settings)
    seen_notes: set[str] = set()

    def report(finding: Finding) -> None:
        # A note's first example is enough; what is wrong is listed in full.
        if finding.wrong or finding.kind not in seen_notes:
            _print_line(out, finding.text, "red" if finding.wrong else "yellow")
        seen_notes.add(finding.kind)

    checker = DataCheck(max_length, encoder, report)
    results = []
    for name in [path for file in files for path in _resolved(file)]:
        seen_notes.clear()
        result = checker.check(name, format=format)
        _print_file(out, result)
        results.append(result)
    for note in encoder.notes if encoder is not None else ():
        _print_line(out, f"note: {note}", "yellow")
    _print_lengths_hint(out, model, max_length)
    _verdict(out, results)


def _settings(format: str, max_length: int, reasoning: str, chat_template: str | None) -> Any:
    from qtrain.errors import UserError
    from qtrain.recipe.schema import DataSettings

    choices = {"format": format, "reasoning": reasoning}
    for name, value in choices.items():
        known = DataSettings.model_fields[name].annotation.__args__  # type: ignore[union-attr]
        if value not in known:
            raise UserError(f"--{name}: '{value}' is not one of {', '.join(known)}")
    return DataSettings.model_validate({**choices, "max_length": max_length, "chat_template": chat_template})


def _encoder(model: str, settings: Any) -> ChatEncoder:
    from qtrain.data.template import ChatEncoder
    from qtrain.model.folder import base_folder
    from qtrain.model.load import load_tokenizer
    from qtrain.recipe.schema import ModelSettings

    return ChatEncoder(
        load_tokenizer(base_folder(model), ModelSettings.model_validate({"name": model})),
        max_length=settings.max_length,
        reasoning=settings.reasoning,
        chat_template=settings.chat_template,
    )


def _resolved(name: str) -> list[str]:
    """The paths of a name: those of both methods for `demo`."""
    from qtrain.data.dataset import resolve_name

    return list(dict.fromkeys([resolve_name(name, "sft"), resolve_name(name, "dpo")]))


def _print_line(out: Console, text: str, style: str) -> None:
    # never wrapped, no markup: these lines are for grep and editors as well
    out.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _print_file(out: Console, result: FileCheck) -> None:
    from rich.table import Table

    from qtrain.data.check import NOTED, WRONG

    _print_line(out, f"{result.name}: {result.reason or 'no rows of a known format'}", "bold")
    if result.extra_columns:
        columns = ", ".join(result.extra_columns[:8]) + (" ..." if len(result.extra_columns) > 8 else "")
        _print_line(out, f"other columns, not trained on: {columns}", "dim")
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(justify="right")
    table.add_column()
    table.add_row(f"{result.records:,}", "rows read")
    table.add_row(f"{result.good:,}", "rows or instances of the right form")
    if result.lengths:
        median, most, longest = (result.length(share) for share in (0.5, 0.95, 1.0))
        table.add_row(
            f"{median:,}", f"tokens in the median row; 95 % have up to {most:,}, the longest {longest:,}"
        )
    for kinds, style, verdict in ((WRONG, "red", "wrong"), (NOTED, "yellow", "noted")):
        for kind, what in kinds.items():
            if result.found[kind]:
                table.add_row(f"{result.found[kind]:,}", f"{what} ({verdict})", style=style)
    out.print(table)


def _print_lengths_hint(out: Console, model: str | None, max_length: int) -> None:
    if model is None:
        _print_line(
            out,
            f"lengths: not counted in tokens (a row of up to {max_length} bytes is never cut, but for the "
            "template's own tokens); count them with --model NAME",
            "dim",
        )


def _verdict(out: Console, results: list[FileCheck]) -> None:
    from qtrain.data.check import WRONG

    wrong = {kind: sum(result.found[kind] for result in results) for kind in WRONG}
    said = [f"{WRONG[kind]}: {count:,}" for kind, count in wrong.items() if count]
    if not said:
        _print_line(out, "nothing is wrong", "green")
        return
    _print_line(out, f"wrong: {'; '.join(said)}", "bold red")
    raise typer.Exit(1)
