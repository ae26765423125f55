"""The formats of a row: how each is recognised, and how it becomes conversations or a preference pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qtrain.data.records import Record, kind_of, shorten
from qtrain.data.rows import Conversation, Message, PreferencePair, Row
from qtrain.data.turns import RowError, check_order, make_message, optional_text, parse_messages, text_of


@dataclass(frozen=True, slots=True)
class Format:
    """A row format: columns that must be there, columns that may, and the function that reads a row."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    parse: Callable[[Record, Format], list[Row]]

    def extra(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The columns that are no part of the format."""
        known = {*self.required, *self.optional}
        return {key: value for key, value in row.items() if key not in known}


def detect(row: Mapping[str, Any]) -> tuple[Format, str] | None:
    """The format whose columns `row` has, and the reason in words; None where no format fits.

    A column that holds null counts only where nothing else decides: parquet has every column in every row.
    """
    filled = {key for key, value in row.items() if value is not None}
    for columns in (filled, set(row)):
        for fmt in FORMATS.values():
            if columns.issuperset(_TELLING[fmt.name]):
                seen = [key for key in (*_TELLING[fmt.name], "reasoning") if key in columns]
                return fmt, f"{fmt.name}: {_and(seen)} {'is' if len(seen) == 1 else 'are'} there"
    return None


def unknown_format_reason(row: Mapping[str, Any]) -> str:
    """Why `detect` found nothing: the columns that are there, and those that each format needs."""
    keys = ", ".join(f"'{shorten(str(key), 30)}'" for key in list(row)[:8]) or "none"
    wanted = "; ".join(f"{fmt.name} {_and(_TELLING[fmt.name])}" for fmt in FORMATS.values())
    return f"fits no known format: its columns are {keys} (needed: {wanted})"


def parse(record: Record, fmt: Format) -> list[Row]:
    """The rows of a record: one, or one for each instance of a self-instruct row.

    Raises:
        RowError: a field is missing, empty or of a wrong type, or the turns are out of order.
    """
    return fmt.parse(record, fmt)


def _single_turn(record: Record, fmt: Format) -> list[Row]:
    row = record.value
    _, context, answer = (*fmt.required[:1], fmt.optional[0], fmt.required[1])
    instruction = _required(row, "instruction")
    context_text = optional_text(row.get(context), f"'{context}'")
    reasoning = optional_text(row.get("reasoning"), "'reasoning'")
    reply = make_message("assistant", _required(row, answer), reasoning, f"'{answer}'")
    messages = (*_system(row), _ask(instruction, context_text), reply)
    return [Conversation(messages, record.source, fmt.extra(row))]


def _self_instruct(record: Record, fmt: Format) -> list[Row]:
    row = record.value
    instruction = _required(row, "instruction")
    instances = row.get("instances")
    if not isinstance(instances, list) or not instances:
        what = "is an empty list" if instances == [] else f"is {kind_of(instances)} and must be a list"
        raise RowError(f"'instances' {what} of objects with 'input' and 'output'")
    rows: list[Row] = []
    for number, instance in enumerate(instances, start=1):
        where = f"'instances': number {number}"
        if not isinstance(instance, Mapping):
            raise RowError(f"{where} is {kind_of(instance)} and must be an object with 'input' and 'output'")
        context = optional_text(instance.get("input"), f"{where}: 'input'")
        reasoning = optional_text(instance.get("reasoning"), f"{where}: 'reasoning'")
        answer = _required(instance, "output", f"{where}: ")
        reply = make_message("assistant", answer, reasoning, where)
        messages = (*_system(row), _ask(instruction, context), reply)
        rows.append(Conversation(messages, record.source, fmt.extra(row)))
    return rows


def _chat(record: Record, fmt: Format) -> list[Row]:
    row = record.value
    column = fmt.required[0]
    if column not in row:
        raise RowError(_missing(row, column))
    messages = parse_messages(row[column], f"'{column}'")
    if "system" in row and messages[0].role != "system":
        messages = (*_system(row), *messages)
    check_order(messages, f"'{column}'")
    if not any(message.role == "assistant" for message in messages):
        raise RowError(f"'{column}' has no assistant turn, so that there is nothing to learn")
    return [Conversation(messages, record.source, fmt.extra(row))]


def _preference(record: Record, fmt: Format) -> list[Row]:
    row = record.value
    if optional_text(row.get("reasoning"), "'reasoning'") is not None:
        raise RowError("'reasoning' of a preference row belongs inside the turns of 'chosen' and 'rejected'")
    chosen, rejected = (_continuation(row, column) for column in ("chosen", "rejected"))
    prompt = _prompt(row)
    if (chosen[0].role == "assistant") != (rejected[0].role == "assistant"):
        raise RowError("one of 'chosen' and 'rejected' repeats the prompt and the other does not")
    if chosen[0].role != "assistant":
        shared, chosen, rejected = _split_shared(chosen, rejected)
        _check_same_prompt(prompt, shared)
        prompt = shared
    if not prompt:
        raise RowError(_missing(row, "prompt"))
    if prompt[0].role != "system":
        prompt = (*_system(row), *prompt)
    check_order(prompt, "the prompt")
    if prompt[-1].role not in ("user", "tool"):
        raise RowError(f"the prompt ends with the {prompt[-1].role}'s turn and must end with the user's")
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if len(turns) != 1 or turns[0].role != "assistant":
            raise RowError(
                f"'{name}' has {len(turns)} turns after the prompt and must have one, the assistant's"
            )
    if _stripped(chosen[0]) == _stripped(rejected[0]):
        raise RowError("'chosen' and 'rejected' are the same")
    return [PreferencePair(prompt, chosen, rejected, record.source, fmt.extra(row))]


def _continuation(row: Mapping[str, Any], column: str) -> tuple[Message, ...]:
    value = row.get(column)
    if isinstance(value, list):
        return parse_messages(value, f"'{column}'")
    return (make_message("assistant", _required(row, column), None, f"'{column}'"),)


def _prompt(row: Mapping[str, Any]) -> tuple[Message, ...]:
    value = row.get("prompt")
    if isinstance(value, list):
        return parse_messages(value, "'prompt'")
    text = optional_text(value, "'prompt'")
    if text is None and isinstance(value, str):
        raise RowError("'prompt' is empty")
    return () if text is None else (Message("user", text),)


def _split_shared(
    chosen: tuple[Message, ...], rejected: tuple[Message, ...]
) -> tuple[tuple[Message, ...], tuple[Message, ...], tuple[Message, ...]]:
    """Two whole conversations as (the turns they share, what each goes on with)."""
    count = 0
    while count < min(len(chosen), len(rejected)) and chosen[count] == rejected[count]:
        count += 1
    if count == len(chosen) == len(rejected):
        raise RowError("'chosen' and 'rejected' are the same")
    if count == 0 or not (chosen[count:] and rejected[count:]):
        raise RowError("'chosen' and 'rejected' are whole conversations but do not share their prompt")
    return chosen[:count], chosen[count:], rejected[count:]


def _check_same_prompt(prompt: tuple[Message, ...], shared: tuple[Message, ...]) -> None:
    without_system = [message for message in shared if message.role != "system"]
    told = [message for message in prompt if message.role != "system"]
    if told and told not in (without_system, without_system[-1:]):
        raise RowError("'prompt' differs from the prompt that 'chosen' and 'rejected' begin with")


def _stripped(message: Message) -> tuple[str, str]:
    return message.content.strip(), (message.reasoning or "").strip()


def _required(row: Mapping[str, Any], column: str, where: str = "") -> str:
    if column not in row:
        raise RowError(where + _missing(row, column))
    return text_of(row[column], f"{where}'{column}'")


def _missing(row: Mapping[str, Any], column: str) -> str:
    there = ", ".join(shorten(str(key), 30) for key in list(row)[:8]) or "nothing"
    return f"'{column}' is missing (there: {there})"


def _system(row: Mapping[str, Any]) -> tuple[Message, ...]:
    text = optional_text(row.get("system"), "'system'")
    return () if text is None else (Message("system", text),)


def _ask(instruction: str, context: str | None) -> Message:
    return Message("user", instruction if context is None else f"{instruction}\n\n{context}")


def _and(columns: tuple[str, ...] | list[str]) -> str:
    quoted = [f"'{column}'" for column in columns]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"


# In the order in which they are tried: the columns that say most come first.
FORMATS: dict[str, Format] = {
    fmt.name: fmt
    for fmt in (
        Format("preference", ("chosen", "rejected"), ("prompt", "system", "reasoning"), _preference),
        Format("openai", ("messages",), ("system",), _chat),
        Format("sharegpt", ("conversations",), ("system",), _chat),
        Format("self-instruct", ("instruction", "instances"), ("system",), _self_instruct),
        Format("alpaca", ("instruction", "output"), ("input", "system", "reasoning"), _single_turn),
        Format("dolly", ("instruction", "response"), ("context", "system", "reasoning"), _single_turn),
    )
}
_TELLING = {fmt.name: fmt.required for fmt in FORMATS.values()}
