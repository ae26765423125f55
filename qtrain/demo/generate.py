"""Writes the demo's data: `python -m qtrain.demo.generate [--out DIR] [--check]`.

Deterministic: the committed files are what this writes. Held-out rows are drawn first, and nothing
that a training row is made of - its cities, or its table's entries and columns - is theirs.

`--further N --out DIR` writes N more held-out rows of each language instead, to tell models apart whose
scores on the demo's 60 lie close together.
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
    return {f"{name}-{language}.jsonl": _jsonl(name, rows) for name, rows in _all_examples(language).items()}


def generate_further(language: str, count: int) -> dict[str, bytes]:
    """A file of `count` held-out rows for SFT that are none of `generate`'s, nor made of a training row's."""
    taken = {its.signature for examples in _all_examples(language).values() for its in examples}
    examples = list(_draw(LANGUAGES[language], Random(f"{SEED}-{language}-further"), count, taken))
    return {f"sft-further-{language}.jsonl": _jsonl("sft-heldout", examples)}


def _all_examples(language: str) -> dict[str, list[Example]]:
    random = Random(f"{SEED}-{language}")
    taken: set[str] = set()
    found = {}
    for name, count in COUNTS.items():
        found[name] = list(_draw(LANGUAGES[language], random, count, taken))
        if name.endswith("heldout"):
            taken |= {example.signature for example in found[name]}
    return found


def _jsonl(name: str, examples: list[Example]) -> bytes:
    rows = (_row(name, number, example) for number, example in enumerate(examples))
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


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
    parser.add_argument("--out", type=Path, default=None, help="folder to write to (default: the demo's own)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a file differs")
    parser.add_argument("--further", type=int, metavar="N", help="write N more held-out rows instead")
    options = parser.parse_args(arguments)
    if options.further is not None and (options.further < 1 or options.out is None or options.check):
        parser.error("--further takes 1 row or more, and --out DIR that is not the demo's own")
    folder = options.out or demo_path("sft", "train").parent
    stale = 0
    for language in LANGUAGES:
        files = generate_further(language, options.further) if options.further else generate(language)
        for name, content in files.items():
            path = folder / name
            if not options.check:
                folder.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            elif not path.is_file() or path.read_bytes() != content:
                stale += 1
                sys.stderr.write(
                    f"{path} is not what the generator writes; run python -m qtrain.demo.generate\n"
                )
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
