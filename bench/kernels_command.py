"""The command `kernels`: of `qtrain bench` and of `python -m qtrain.bench`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .kernel_shapes import DROPOUT_P, DTYPES, MODELS, OPS, QUICK_MODELS, QUICK_ROWS, RANK, ROWS, Case, cases

if TYPE_CHECKING:
    from rich.console import Console

    from .kernel_run import Bench

GPU_ROUNDS, CPU_ROUNDS, LEAST_CPU_ROUNDS = 30, 30, 5
GPU_WARM_UP, CPU_WARM_UP = 10, 1


def kernels(
    op: Annotated[list[str] | None, typer.Option(help=f"Any of: {', '.join(OPS)}; default all.")] = None,
    model: Annotated[
        list[str] | None, typer.Option(help=f"Qwen2.5 of size {', '.join(MODELS)}; default all.")
    ] = None,
    rows: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens, M; repeatable; default 128 to 16384.")
    ] = None,
    variant: Annotated[
        list[str] | None, typer.Option(help="Only variants whose name contains this; repeatable.")
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"One of: {', '.join(DTYPES)}.")] = "bf16",
    quick: Annotated[
        bool,
        typer.Option("--quick", help="The smallest model, few linears, M 128 and 512; without a GPU so."),
    ] = False,
    hot: Annotated[bool, typer.Option("--hot", help="Leave the caches as the last run left them.")] = False,
    samples: Annotated[int, typer.Option(min=2, help="Of each variant; without a GPU at most.")] = GPU_ROUNDS,
    budget: Annotated[
        float, typer.Option(min=0, help="Without a GPU: seconds of sampling for each variant of a case.")
    ] = 2.0,
    wall: Annotated[
        bool, typer.Option("--wall", help="Without a GPU: wall-clock time, not CPU time of all threads.")
    ] = False,
    threads: Annotated[int, typer.Option(min=0, help="Of PyTorch on the CPU; 0: as it chooses.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of the inputs and the order.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write rows and raw samples as JSON.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables as Markdown.")] = None,
) -> None:
    """Time every op beside eager PyTorch, torch.compile and the peers; a wrong result gets no time.

    On a CUDA device where there is one, else on the CPU. A ratio above 1 says that the variant takes longer
    than qtrain. Exit code 1: a variant of qtrain's own is wrong or fails.
    """
    from rich.console import Console

    say = Console(stderr=True, highlight=False)
    for option, path in (("--out", out), ("--markdown", markdown)):
        if path is not None and not path.parent.is_dir():
            _refuse(say, f"{option} {path}: there is no folder {path.parent}")
    ops = _known(say, "--op", op, OPS)
    models = _known(say, "--model", model, MODELS)
    _known(say, "--dtype", [dtype], DTYPES)
    _settle()
    import torch

    from .kernel_variants import VARIANT_NAMES

    if variant and not any(_contains(name, variant) for name in VARIANT_NAMES):
        _refuse(say, f"--variant {variant[0]}: there is {', '.join(VARIANT_NAMES)}")
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu" and not (quick or (model and rows)):
        say.print("no GPU: the quick suite, on the CPU; name --model and --rows for other shapes")
        quick = True
    if threads:
        torch.set_num_threads(threads)
    if not model and quick:
        models = list(QUICK_MODELS)
    chosen = list(cases(ops, models, rows or (QUICK_ROWS if quick else ROWS), dtype, quick=quick))
    bench, about = _set_up(kind, variant or [], hot=hot, wall=wall, samples=samples, budget=budget, seed=seed)
    found = _run(chosen, bench, say)
    about["machine"] |= _clocks("after")
    if out is not None:
        _write_json(found, about, bench, out)
        say.print(f"wrote {out}", markup=False)
    _show(found, bench, markdown)
    broken = ("wrong", "failed")
    raise typer.Exit(
        int(any(r["variant"].startswith("qtrain") and r["status"].startswith(broken) for r in found))
    )


def _known(say: Console, option: str, given: Sequence[str] | None, there: Collection[str]) -> list[str]:
    """What was given, or everything."""
    for name in given or []:
        if name not in there:
            _refuse(say, f"{option} {name}: there is {', '.join(there)}")
    return list(given or there)


def _refuse(say: Console, line: str) -> None:
    say.print(line, style="red", markup=False, soft_wrap=True)
    raise typer.Exit(2)


def _contains(name: str, words: Sequence[str]) -> bool:
    return any(word in name for word in words)


def _settle() -> None:
    """Before torch is imported: OpenMP's threads sleep while they wait, or their spinning is measured."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.pop("GOMP_SPINCOUNT", None)  # the command line's default, which would come first
    # logs, when imported, that it found no hub kernels for CPUs; none are used
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _set_up(
    kind: str, words: Sequence[str], *, hot: bool, wall: bool, samples: int, budget: float, seed: int
) -> tuple[Bench, dict[str, Any]]:
    """The device with its protocol, and what the report says of itself."""
    import torch

    from .kernel_roofline import rates_of
    from .kernel_run import Bench
    from .kernel_timing import Plan, make_device
    from .provenance import PACKAGES, provenance
    from .variants import OURS

    cuda = kind == "cuda"
    clock = "CUDA events" if cuda else "wall" if wall else "CPU time of all threads"
    plan = Plan(
        least=samples if cuda else min(samples, LEAST_CPU_ROUNDS),
        most=samples,
        warm_up=GPU_WARM_UP if cuda else CPU_WARM_UP,
        budget_s=budget,
        cold=not hot,
        seed=seed,
    )
    about = provenance((*PACKAGES, "trl", "liger-kernel"))
    about["machine"] |= {"threads": torch.get_num_threads()} | _clocks("before")
    name = torch.cuda.get_device_name() if cuda else ""
    wanted = [*words, OURS] if words else [""]  # ratios need ours, verdicts need it twice
    return Bench(
        kind, make_device(kind, wall=wall), clock, plan, rates_of(name), partial(_contains, words=wanted)
    ), about


def _clocks(when: str) -> dict[str, Any]:
    from .provenance import gpu_clocks

    return {f"gpu_clocks_{when}": gpu_clocks()}


def _run(chosen: Sequence[Case], bench: Bench, say: Console) -> list[dict[str, Any]]:
    from .kernel_run import run_case

    found: list[dict[str, Any]] = []
    try:
        for number, case in enumerate(chosen, 1):
            where = f"{case.op} {case.model} {case.part} {case.base} M {case.rows}"
            say.print(f"{number}/{len(chosen)} {where}", markup=False)
            found += run_case(case, bench)
    except KeyboardInterrupt:  # a whole suite takes hours: what is done is kept
        say.print(f"interrupted: {len(chosen) - number + 1} of {len(chosen)} cases are missing", style="red")
    return found


def _show(found: Sequence[dict[str, Any]], bench: Bench, markdown: Path | None) -> None:
    from rich.console import Console

    from .kernel_report import cells, columns, notes, sections, tables
    from .table import markdown_table, terminal_table

    screen = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120, highlight=False)
    cache = "cold" if bench.plan.cold else "hot"
    about = f"ms: {bench.clock}, {cache} caches. MiB: added at the peak. LoRA: r {RANK}, dropout {DROPOUT_P}."
    screen.print(about, markup=False)
    heads = columns(found)
    parts = []
    for title, rows in tables(found):
        lines = [cells(row, len(heads) > 6) for row in rows]
        table = terminal_table(title, heads, lines)
        end = -1
        for section in sections(rows):
            end += len(section)
            table.rows[end].end_section = True
        screen.print(table, markup=False)
        parts.append(f"### {title}\n\n{markdown_table(heads, lines)}")
    for note in notes(found):
        screen.print(note, markup=False, soft_wrap=True)
    if markdown is not None:
        listed = "".join(f"- {note}\n" for note in notes(found))
        markdown.write_text("\n".join([*parts, listed]))


def _write_json(found: Sequence[dict[str, Any]], about: dict[str, Any], bench: Bench, path: Path) -> None:
    import json
    from dataclasses import asdict

    protocol = asdict(bench.plan) | {
        "device": bench.kind,
        "clock": bench.clock,
        "peak_bytes": "PyTorch's allocator" if bench.kind == "cuda" else "resident memory",
        "order": "rounds of one sample each, every round in random order",
        "rates": None if bench.rates is None else asdict(bench.rates),
    }
    report = {"kind": "kernels", "provenance": about, "protocol": protocol, "rows": list(found)}
    path.write_text(json.dumps(report, indent=1) + "\n")
