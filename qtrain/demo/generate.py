"""Writes the demo's data: `python -m qtrain.demo.generate [--out DIR] [--check]`.

Deterministic: the committed files are what this writes. Held-out rows are drawn first, and nothing
that a training row is made of - its cities, or its table's entries and columns - is theirs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from .files import demo_path
from .tasks import Example, draw_report, draw_table
from .words import LANGUAGES, Words

SEED = 20
COUNTS = {"sft-heldout": 60, "dpo-heldout": 36, "sft-train": 720, "dpo-train": 160}
# of twelve examples in a row, how many are: a table, a report to be worked out, a report of given figures
MIX = "rtrgrtrtrgrt"


def generate(language: str) -> dict[str, bytes]:
    """File name -> content, for one language."""
    words = LANGUAGES[language]
    random = Random(f"{SEED}-{language}")
    taken: set[str] = set()
    files = {}
    for name, count in COUNTS.items():
        examples = list(_draw(words, random, count, taken))
        if name.endswith("heldout"):
            taken |= {example.signature for example in examples}
        rows = (_row(name, number, example) for number, example in enumerate(examples))
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        files[f"{name}-{language}.jsonl"] = text.encode()
    return files


def _draw(words: Words, random: Random, count: int, taken: set[str]) -> Iterator[Example]:
    """`count` different examples, none with a signature that is taken."""
    seen: set[str] = set()
    for number in range(count):
        while True:
            example = _draw_one(words, random, MIX[number % len(MIX)])
            if example.signature not in taken and example.input not in seen:
                break
        seen.add(example.input)
        yield example


def _draw_one(words: Words, random: Random, kind: str) -> Example:
    return draw_table(words, random) if kind == "t" else draw_report(words, random, given=kind == "g")


def _row(name: str, number: int, example: Example) -> dict[str, Any]:
    """Alpaca rows for SFT; message lists for DPO, where an answer's reasoning stands in its turn."""
    if name.startswith("sft"):
        row: dict[str, Any] = {"instruction": example.instruction, "input": example.input}
        if example.reasoning is not None:
            row["reasoning"] = example.reasoning
        row["output"] = example.output
        if name.endswith("heldout"):
            row["check"] = example.check
        return row
    output, reasoning = example.rejected[number // len(MIX) % len(example.rejected)]
    return {
        "prompt": [{"role": "user", "content": f"{example.instruction}\n\n{example.input}"}],
        "chosen": [_turn(example.output, example.reasoning)],
        "rejected": [_turn(output, reasoning)],
    }


def _turn(content: str, reasoning: str | None) -> dict[str, str]:
    turn = {"role": "assistant", "content": content}
    return turn if reasoning is None else {**turn, "reasoning": reasoning}


def main(arguments: list[str] | None = None) -> int:
    """Write the files, or (--check) compare those there; 1 when one differs."""
    parser = argparse.ArgumentParser(
        prog="python -m qtrain.demo.generate", description="Write the demo data."
    )
    parser.add_argument(
        "--out", type=Path, default=demo_path("sft", "train").parent, help="folder to write to"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a file differs")
    options = parser.parse_args(arguments)
    stale = 0
    for language in LANGUAGES:
        for name, content in generate(language).items():
            path = options.out / name
            if not options.check:
                options.out.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            elif not path.is_file() or path.read_bytes() != content:
                stale += 1
                sys.stderr.write(
                    f"{path} is not what the generator writes; run python -m qtrain.demo.generate\n"
                )
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
