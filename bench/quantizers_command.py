"""`qtrain bench quantizers`: 4-bit exports of one model by this project and by its peers.

Every export is a process of its own on the same calibration windows; what it wrote is then read back and
scored on held-out windows by one and the same code. `docs/benchmarks.md` says how to read the table.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from .peers.environments import CACHE
from .provenance import provenance
from .quantizer_text import TextError, Windows, cut_windows, documents
from .quantizer_variants import GROUP_SIZES, VARIANTS
from .table import markdown_table, terminal_table

if TYPE_CHECKING:
    from .quantizers import Plan

DEMO_MODEL = "from qtrain.demo.base_model import demo_model_folder; print(demo_model_folder())"


def quantizers(
    out: Annotated[Path | None, typer.Option(help="Write everything, raw samples included, as JSON.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables as Markdown.")] = None,
    model: Annotated[
        Path | None, typer.Option(help="A bf16 model folder (default: the demo's, of 135M parameters).")
    ] = None,
    group_size: Annotated[list[int] | None, typer.Option(help="Repeatable; default 64 and 32.")] = None,
    variant: Annotated[
        list[str] | None, typer.Option(help="Only variants whose name contains this; repeatable.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Exports by this project.")] = 2,
    peer_rounds: Annotated[int, typer.Option(min=1, help="Exports by each peer.")] = 1,
    calib: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 32,
    held_out: Annotated[int, typer.Option(min=2, help="Held-out windows.")] = 16,
    length: Annotated[int, typer.Option(min=8, help="Tokens of a window.")] = 512,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that one export may take.")] = 3600,
    seed: Annotated[int, typer.Option(min=0, help="Of the windows and the order.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what a run with the same windows and code has finished.")
    ] = False,
    part: Annotated[
        str, typer.Option(help="exports, scores, or all: a long run in pieces, with --resume.")
    ] = "all",
    cache: Annotated[Path, typer.Option(help="Holds text, exports, the peers' environments.")] = CACHE,
) -> None:
    """Compare 4-bit exports with the peers': perplexity and KL on held-out text, time, memory, size."""
    console = Console(stderr=True)
    if part not in ("all", "exports", "scores"):
        _refuse(console, f"--part {part}: there is all, exports, scores")
    chosen = [its for its in VARIANTS if not variant or any(word in its.name for word in variant)]
    if not chosen:
        _refuse(console, f"--variant {variant}: there is {', '.join(its.name for its in VARIANTS)}")
    from qtrain.export.errors import ExportError

    from .quantizers import Plan, export_all, score_all

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False)

    about = provenance()
    sizes = tuple(group_size or GROUP_SIZES)
    try:
        folder = model or _demo_model()
        windows = _windows(folder, cache, calib, held_out, length, seed)
        plan = Plan(folder, windows, sizes, rounds, peer_rounds, threads, timeout, seed, cache)
        if part != "scores":
            export_all(plan, chosen, resume=resume, say=say)
        if part != "exports":
            samples = score_all(plan, chosen, say)
            _report(about, plan, samples, out, markdown, console)
    except (TextError, ExportError) as error:
        _refuse(console, str(error))


def _report(
    about: dict[str, Any],
    plan: Plan,
    samples: list[dict[str, Any]],
    out: Path | None,
    markdown: Path | None,
    console: Console,
) -> None:
    from .quantizer_report import comparisons, long_rows, not_best

    rows = long_rows(samples, seed=plan.seed)
    compared = comparisons(samples, rows, seed=plan.seed)
    if out is not None:
        report = {
            "kind": "quantizers",
            "provenance": about,
            "protocol": plan.protocol(),
            "text": plan.windows.as_dict(),
            "model": plan.model_about(),
            "rows": rows,
            "comparisons": compared,
            "not_best": not_best(compared),
            "samples": samples,
        }
        out.write_text(json.dumps(report, indent=1) + "\n")
        console.print(f"wrote {out}", highlight=False)
    text = show(rows, compared, Console(width=None if sys.stdout.isatty() else 200))
    if markdown is not None:
        markdown.write_text(text)


def _refuse(console: Console, line: str) -> NoReturn:
    console.print(line, style="red", highlight=False, markup=False)
    raise typer.Exit(2)


def _demo_model() -> Path:
    """Asked of the app in a process of its own: this room does not import it."""
    done = subprocess.run([sys.executable, "-c", DEMO_MODEL], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
        raise TextError(f"the demo's model can't be had: {reason}; or give --model FOLDER")
    return Path(done.stdout.strip())


def _windows(model: Path, cache: Path, calibration: int, held_out: int, length: int, seed: int) -> Windows:
    from transformers import AutoTokenizer

    if not (model / "config.json").is_file():
        raise TextError(f"--model {model}: there is no config.json")
    tokenizer: Any = AutoTokenizer.from_pretrained(model)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    return cut_windows(
        documents(cache), encode, calibration=calibration, held_out=held_out, length=length, seed=seed
    )


def show(rows: list[dict[str, Any]], compared: list[dict[str, Any]], screen: Console) -> str:
    """The tables on the screen; returns them as Markdown."""
    from .quantizer_report import COLUMNS, COMPARED, cells, compared_cells, not_best

    parts = []
    for group_size in dict.fromkeys(row["group_size"] for row in rows):
        lines = [cells(row) for row in rows if row["group_size"] == group_size]
        pairs = [compared_cells(pair) for pair in compared if pair["group_size"] == group_size]
        screen.print(terminal_table(f"4 bits, group {group_size}", COLUMNS, lines))
        parts.append(f"### 4 bits, group {group_size}\n\n{markdown_table(COLUMNS, lines)}\n")
        if pairs:
            screen.print(terminal_table(f"Ours against the others, group {group_size}", COMPARED, pairs))
            parts.append(f"{markdown_table(COMPARED, pairs)}\n")
    for line in not_best(compared):
        screen.print(f"not the best: {line}", highlight=False, markup=False)
    return "".join(parts) + "".join(f"- {line}\n" for line in not_best(compared))


if __name__ == "__main__":
    typer.run(quantizers)
