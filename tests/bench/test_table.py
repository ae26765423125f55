"""Markdown and terminal tables."""

from __future__ import annotations

import pytest
from rich.console import Console

from qtrain.bench.table import Column, figure, markdown_table, terminal_table

COLUMNS = (Column("variant", numeric=False), Column("CPU s"))


def test_markdown_aligns_figures_and_escapes_bars() -> None:
    assert (
        markdown_table(COLUMNS, [["a|b", "1.0"]]) == "| variant | CPU s |\n| --- | ---: |\n| a\\|b | 1.0 |\n"
    )


def test_terminal_table_shows_every_cell() -> None:
    console = Console(width=60)
    with console.capture() as captured:
        console.print(terminal_table("DPO", COLUMNS, [["qtrain", "2.16"], ["TRL", "32.10"]]))
    shown = captured.get()
    assert all(word in shown for word in ("DPO", "variant", "qtrain", "2.16", "TRL", "32.10"))


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="1 cells for 2 columns"):
        markdown_table(COLUMNS, [["qtrain"]])


def test_figures() -> None:
    assert figure(2.157, 2) == "2.16"
    assert figure(None) == "–"
