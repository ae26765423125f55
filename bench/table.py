"""Rows of text as a terminal table or as Markdown for the documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table


@dataclass(frozen=True, slots=True)
class Column:
    """A heading; figures stand to the right, words to the left."""

    heading: str
    numeric: bool = True


def terminal_table(title: str, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> Table:
    """A rich table.

    Raises:
        ValueError: a row has not as many cells as there are columns.
    """
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(
            column.heading, justify="right" if column.numeric else "left", no_wrap=column.numeric
        )
    for row in _checked(columns, rows):
        table.add_row(*row)
    return table


def markdown_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; `|` in a cell is escaped.

    Raises:
        ValueError: a row has not as many cells as there are columns.
    """
    lines = [
        [column.heading for column in columns],
        ["---:" if column.numeric else "---" for column in columns],
        *_checked(columns, rows),
    ]
    return (
        "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        + "\n"
    )


def figure(value: float | None, digits: int = 1) -> str:
    """A number for a cell; an en dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def _checked(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> Sequence[Sequence[str]]:
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"{len(row)} cells for {len(columns)} columns: {row}")
    return rows
