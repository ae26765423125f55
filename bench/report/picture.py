"""The plot for a README: what a training step takes, as a PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from ..results import AGAIN, MEMORY, ResultsError, Row
from .source import Source, grouped, is_ours, times
from .text import median_of

MIB = 1 << 20
OURS, OURS_BAR, OTHER, OTHER_BAR, SOFT = "#1d5fd1", "#a9c5f3", "#6b7480", "#c9ced5", "#5d6670"
DTYPE = "bf16"
INCHES_OF_A_ROW, WIDTH = 0.27, 9.0


def draw(source: Source) -> bytes:
    """PNG of the training steps: the median as a dot, the 5th to 95th percentile as a bar.

    Raises:
        ResultsError: no file holds training steps.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in source.rows("train") if row.dtype == DTYPE and not row.variant.endswith(AGAIN)]
    tasks = [task for task in grouped(rows, lambda row: row.op) if any(row.figures for row in task)]
    if not tasks:
        raise ResultsError(
            f"--png draws training steps in {DTYPE}, and no file holds any (`make bench-train`)"
        )
    counts = [len(task) for task in tasks]
    height = INCHES_OF_A_ROW * sum(counts) + 0.55 * len(tasks) + 0.5
    figure = Figure(figsize=(WIDTH, height), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        len(tasks), 2, squeeze=False, sharey="row", gridspec_kw={"height_ratios": [n + 1.2 for n in counts]}
    )
    for task, (left, right) in zip(tasks, axes, strict=True):
        ordered = sorted(task, key=lambda row: -(t.p50 if (t := times(row)) is not None else 0.0))
        _panel(left, ordered, "time", f"{task[0].op.upper()}: CPU seconds for one batch")
        _panel(right, ordered, MEMORY, f"{task[0].op.upper()}: MiB added at the peak")
    setting = source.of("train")[0].setting
    machine = ", ".join(setting[name] for name in ("CPU", "GPU") if setting.get(name, "none") != "none")
    figure.supxlabel(
        f"Dots are medians, bars reach from the 5th to the 95th percentile. {DTYPE}, {machine}, "
        f"{setting.get('threads', 'unknown')} threads.",
        fontsize=7, color=SOFT, x=0.01, ha="left",
    )  # fmt: skip
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": "qtrain bench report"})
    return out.getvalue()


def _panel(axes: Any, rows: Sequence[Row], name: str, title: str) -> None:
    largest = 0.0
    for place, row in enumerate(rows):
        figure = times(row) if name == "time" else row.figures.get(MEMORY)
        if figure is None:
            axes.text(0, place, f" {row.status}", va="center", fontsize=7.5, color=SOFT)
            continue
        scale = 1.0 if name == "time" else MIB
        low, middle, high = (value / scale for value in (figure.p05, figure.p50, figure.p95))
        ours = is_ours(row)
        axes.hlines(place, low, high, color=OURS_BAR if ours else OTHER_BAR, linewidth=5)
        axes.plot([middle], [place], "o", color=OURS if ours else OTHER, markersize=4.5)
        axes.annotate(
            median_of(figure), (high, place), xytext=(7, 0), textcoords="offset points", va="center",
            fontsize=7.5, color=OURS if ours else "#1c2024", fontweight="bold" if ours else "normal",
        )  # fmt: skip
        largest = max(largest, high)
    axes.set_title(title, fontsize=8.5, loc="left", color="#1c2024", fontweight="bold")
    axes.set_xlim(0, 1.18 * largest)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [row.variant for row in rows])
    # of panels side by side only the first has labels
    for label, row in zip(axes.get_yticklabels(), rows, strict=False):
        label.set_color(OURS if is_ours(row) else "#1c2024")
    axes.tick_params(length=0, labelsize=7.5, labelcolor=SOFT, axis="x")
    axes.tick_params(length=0, labelsize=7.5, axis="y")
    axes.grid(axis="x", color="#e2e5e9", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#c9ced5")
