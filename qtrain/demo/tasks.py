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


def draw_report(words: Words, random: Random, *, given: bool) -> Example:
    """Sales of 3-5 cities; the report states total, growth against last week and the top three.

    `given`: the data holds total and growth, and the answer needs no reasoning. Otherwise both are to
    be worked out, and the reasoning shows the running sum, the growth and the order.
    """
    cities = random.sample(words.cities, random.randint(3, 5) if given else random.randint(3, 4))
    sales = dict(zip(cities, random.sample(range(10, 91, 10), len(cities)), strict=True))
    week, last = random.randint(1, 52), random.choice((100, 200))
    total = sum(sales.values())
    growth = (total - last) * 100 // last  # whole: sales come in tens
    order = sorted(cities, key=lambda city: -sales[city])
    week_key, last_key, sales_key, total_key, growth_key = words.report_keys
    data: dict[str, Any] = {week_key: week}
    data |= {total_key: total, growth_key: growth} if given else {last_key: last}
    data[sales_key] = sales

    def report(total: int, growth: int, top: list[str]) -> str:
        return words.report.format(
            week=week, total=total, growth=f"{growth:+d}", top=words.separator.join(top)
        )

    reasoning = None if given else _reasoning(words, sales, last, order, slip=0)
    slip = random.choice((-20, -10, 10, 20))
    wrong_growth = growth if given else (total + slip - last) * 100 // last
    facts = {"week": week, "total": total, "growth": growth, "top": order[:3]}
    chatty = words.chatty_report.format(
        week=week, total=total, growth=f"{growth:+d}", top=words.separator.join(order[:3])
    )
    shuffled = [order[1], order[0], order[2]]
    return Example(
        instruction=words.summary_task if given else words.report_task,
        input=_json(data),
        output=report(total, growth, order[:3]),
        reasoning=reasoning,
        check={"kind": "sales_report", "language": _language(words), **facts},
        signature=f"report:{','.join(sorted(cities))}",
        rejected=(
            (
                report(total + slip, wrong_growth, order[:3]),
                None if given else _reasoning(words, sales, last, order, slip=slip),
            ),
            (report(total, growth, shuffled), reasoning),
            (chatty, None),
        ),
    )


def _language(words: Words) -> str:
    return "zh" if "{week}周" in words.report else "en"


def _reasoning(words: Words, sales: dict[str, int], last: int, order: list[str], slip: int) -> str:
    """The sum step by step (its last step wrong by `slip`), the growth, the cities by sales."""
    values = list(sales.values())
    steps, running = [], values[0]
    for number, value in enumerate(values[1:], start=2):
        before, running = running, running + value + (slip if number == len(values) else 0)
        steps.append(f"{before} + {value} = {running}")
    difference = running - last
    growth = f"{running} - {last} = {difference}, {difference} / {last} = {difference * 100 // last:+d}%"
    ranked = ", ".join(f"{city} {sales[city]}" for city in order)
    lines = (", ".join(steps), growth, ranked)
    return "\n".join(sentence.format(line) for sentence, line in zip(words.thoughts, lines, strict=True))
