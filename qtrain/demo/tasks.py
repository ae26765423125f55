"""The demo's two tasks: draw an example at random, with its answer, its check and answers gone wrong."""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random
from typing import Any

from .words import Words


@dataclass(frozen=True, slots=True)
class Example:
    """One example. `signature` is what no two examples of different splits may share."""

    instruction: str
    input: str
    output: str
    reasoning: str | None
    check: dict[str, Any]
    signature: str
    rejected: tuple[tuple[str, str | None], ...]  # (output, reasoning) of answers gone wrong


def draw_table(words: Words, random: Random) -> Example:
    """A Markdown table of 2-4 rows and 2-3 columns; the answer is a list with one object per row."""
    key, entries, columns = random.choice(words.tables)
    names = random.sample(entries, random.randint(2, 4))
    numbers = random.sample(columns, random.randint(1, 2))
    rows = [{key: name, **{column: random.randint(2, 99) for column in numbers}} for name in names]
    table = "\n".join(
        "| " + " | ".join(str(cell) for cell in cells) + " |"
        for cells in ([key, *numbers], ["---"] * (1 + len(numbers)), *(row.values() for row in rows))
    )
    output = _json(rows)
    return Example(
        instruction=words.table_task,
        input=table,
        output=output,
        reasoning=None,
        check={"kind": "table_json", "expected": rows},
        signature=f"{key}:{','.join(sorted(names))}:{','.join(numbers)}",
        rejected=(
            (_broken_json(output, random), None),
            (_json(_wrong_cell(rows, numbers[0], random)), None),
            (words.chatter + output, None),
        ),
    )


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _broken_json(text: str, random: Random) -> str:
    """As models break it: the end missing, a comma missing, or a quote missing."""
    return random.choice((text[:-2], text.replace("}, {", "} {", 1), text.replace('": ', ": ", 1)))


def _wrong_cell(rows: list[dict[str, Any]], column: str, random: Random) -> list[dict[str, Any]]:
    wrong = [dict(row) for row in rows]
    row = random.choice(wrong)
    row[column] += random.choice((-1, 1, 10))
    return wrong


SALES = range(10, 70, 10)  # in tens, and few: a model of 135M parameters is to add and rank them


def draw_report(words: Words, random: Random, *, given: bool) -> Example:
    """A week's sales; the report states total, growth against last week and the top three cities.

    `given`: the data holds total and growth, and its cities are in order; the report has only to be
    written. Otherwise all of that is to be worked out, which the reasoning does step by step.
    """
    cities = random.sample(words.cities, random.randint(3, 4))
    amounts = random.sample(SALES, len(cities))
    if given:
        amounts.sort(reverse=True)
    sales = dict(zip(cities, amounts, strict=True))
    week, last = random.randint(1, 52), random.choice((100, 200))
    total, growth = sum(amounts), _growth(sum(amounts), last)
    top = sorted(cities, key=lambda city: -sales[city])[:3]
    slip = random.choice((-20, -10, 10, 20))
    week_key, last_key, sales_key, total_key, growth_key = words.report_keys
    figures = {total_key: total, growth_key: growth} if given else {last_key: last}

    def report(template: str, total: int, growth: int, top: list[str]) -> str:
        return template.format(week=week, total=total, growth=f"{growth:+d}", top=words.separator.join(top))

    def reasoning(slip: int) -> str | None:
        return None if given else _reasoning(words, sales, last, slip)

    wrong_growth = growth if given else _growth(total + slip, last)
    return Example(
        instruction=words.summary_task if given else words.report_task,
        input=_json({week_key: week, **figures, sales_key: sales}),
        output=report(words.report, total, growth, top),
        reasoning=reasoning(0),
        check={
            "kind": "sales_report",
            "language": words.language,
            "week": week,
            "total": total,
            "growth": growth,
            "top": top,
        },
        signature=f"report:{','.join(sorted(cities))}",
        rejected=(
            (report(words.report, total + slip, wrong_growth, top), reasoning(slip)),
            (report(words.report, total, growth, [top[1], top[0], top[2]]), reasoning(0)),
            (report(words.chatty_report, total, growth, top), None),
        ),
    )


def _growth(total: int, last: int) -> int:
    """Percent; whole, as sales come in tens and `last` is 100 or 200."""
    return (total - last) * 100 // last


def _reasoning(words: Words, sales: dict[str, int], last: int, slip: int) -> str:
    """The running sum (its last step wrong by `slip`), the growth, and who sold each possible amount."""
    first, *others = sales.values()
    steps, running = [], first
    for number, amount in enumerate(others, start=1):
        before, running = running, running + amount + (slip if number == len(others) else 0)
        steps.append(f"{before} + {amount} = {running}")
    difference = running - last
    growth = f"{running} - {last} = {difference}, {difference} / {last // 100} = {_growth(running, last):+d}"
    city_of = {amount: city for city, amount in sales.items()}
    ranked = ", ".join(f"{amount} {city_of.get(amount, '-')}" for amount in reversed(SALES))
    lines = (", ".join(steps), growth, ranked)
    return "\n".join(thought.format(line) for thought, line in zip(words.thoughts, lines, strict=True))
