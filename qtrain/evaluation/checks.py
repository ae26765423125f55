"""Exact checks of an answer: right or not, and if not, what was wrong. Nothing is scored by similarity.

A check is a mapping with a `kind`; a row of data carries it in its `check` column.

    {"kind": "table_json", "expected": [...]}      the JSON of a table, bare or in one ```json fence
    {"kind": "sales_report", "language": "en", "week": 7, "total": 120, "growth": 20, "top": ["Rome", ...]}
    {"kind": "json_equal", "expected": ...}        as table_json, for anything that JSON can hold
    {"kind": "exact", "expected": "..."}           the same text, runs of white space being one space
    {"kind": "contains", "expected": ["...", ...]} every one of these texts occurs
    {"kind": "regex", "pattern": "..."}            the whole answer matches

A leading <think> block is no part of the answer.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from qtrain.errors import UserError

GROWTH_TOLERANCE = 0.051  # percentage points: the growth may be rounded to one decimal


@dataclass(frozen=True, slots=True)
class CheckResult:
    """Whether an answer is right; `reason` is empty, or says in a line what is wrong."""

    passed: bool
    reason: str = ""


def check_answer(check: Mapping[str, Any], answer: str) -> CheckResult:
    """Hold an answer against its truth.

    Raises:
        UserError: the check's kind is unknown, or the check lacks a key or has a bad value.
    """
    kind = check.get("kind")
    checker = _CHECKERS.get(kind) if isinstance(kind, str) else None
    if checker is None:
        raise UserError(f"check.kind: unknown kind {kind!r}; {_nearest(str(kind))}")
    reason = checker(check, strip_thinking(answer))
    return CheckResult(reason is None, reason or "")


def default_check(reference: str) -> dict[str, Any]:
    """The check of a row that brings none: JSON (object or array) by value, other text by its words."""
    reference = strip_thinking(reference)
    try:
        value = _parse_json(reference)
    except ValueError:
        return {"kind": "exact", "expected": reference}
    if isinstance(value, dict | list):
        return {"kind": "json_equal", "expected": value}
    return {"kind": "exact", "expected": reference}


def strip_thinking(answer: str) -> str:
    """What follows a leading <think> block; all of it when there is none. An unclosed block leaves ""."""
    text = answer.lstrip()
    if not text.startswith("<think>"):
        return answer
    _, closed, rest = text.partition("</think>")
    return rest.lstrip() if closed else ""


def _nearest(kind: str) -> str:
    close = get_close_matches(kind, _CHECKERS, n=1)
    valid = f"the kinds are {', '.join(_CHECKERS)}"
    return f"did you mean {close[0]!r}? {valid}" if close else valid


def _need(check: Mapping[str, Any], key: str, kinds: type | tuple[type, ...] = object) -> Any:
    if key not in check:
        raise UserError(f"check.{key} is missing; a check of kind {check['kind']!r} needs it")
    value = check[key]
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not object):
        raise UserError(f"check.{key} is {value!r}, which a check of kind {check['kind']!r} can't use")
    return value


_FENCE = re.compile(r"\s*```(?:json)?[ \t]*\r?\n(.*?)\r?\n?[ \t]*```\s*", re.DOTALL | re.IGNORECASE)


def _json_equal(check: Mapping[str, Any], answer: str) -> str | None:
    """One fence around the whole answer is allowed, text around the JSON is not: a program reads this."""
    expected = _need(check, "expected")
    fenced = _FENCE.fullmatch(answer)
    text = fenced[1] if fenced else answer
    if not text.strip():
        return "the answer is empty"
    try:
        value = _parse_json(text)
    except ValueError as error:
        return f"not valid JSON: {error}"
    return _difference(expected, value, "$")


def _parse_json(text: str) -> Any:
    """Strict JSON: no NaN, and no key twice in one object."""

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    def unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(items)
        if len(value) != len(items):
            raise ValueError("a key occurs twice in one object")
        return value

    try:
        return json.loads(text, parse_constant=constant, object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _difference(expected: Any, found: Any, path: str) -> str | None:
    """The first place where two JSON values differ; 1 and 1.0 are equal, 1, "1" and true are not."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in expected:
            if key not in found:
                return f"{path}: key {key!r} is missing"
        for key in found:
            if key not in expected:
                return f"{path}: key {key!r} is too much"
        parts = [_difference(expected[key], found[key], f"{path}.{key}") for key in expected]
    elif isinstance(expected, list) and isinstance(found, list):
        if len(expected) != len(found):
            return f"{path}: {len(expected)} items expected, {len(found)} found"
        both = enumerate(zip(expected, found, strict=True))
        parts = [_difference(theirs, ours, f"{path}[{i}]") for i, (theirs, ours) in both]
    else:
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (expected, found))
        same = expected == found and (numbers or type(expected) is type(found))
        return None if same else f"{path}: {_short(expected)} expected, {_short(found)} found"
    return next((reason for reason in parts if reason), None)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _exact(check: Mapping[str, Any], answer: str) -> str | None:
    expected, found = (" ".join(text.split()) for text in (_need(check, "expected", str), answer))
    return None if expected == found else f"{_short(expected)} expected, {_short(found)} found"


def _contains(check: Mapping[str, Any], answer: str) -> str | None:
    expected = _need(check, "expected", (str, list))
    texts = [expected] if isinstance(expected, str) else expected
    missing = [str(text) for text in texts if str(text) not in answer]
    return f"{_short(missing[0])} does not occur" if missing else None


def _regex(check: Mapping[str, Any], answer: str) -> str | None:
    pattern = _need(check, "pattern", str)
    try:
        found = re.fullmatch(pattern, answer.strip(), re.DOTALL)
    except re.error as error:
        raise UserError(f"check.pattern {pattern!r} is no regular expression: {error}") from error
    return None if found else f"{_short(answer.strip())} does not match {pattern}"


_NUMBER = r"[+-]?\d[\d,]*(?:\.\d+)?"
_REPORT_LINES = {
    "en": (
        ("week", r"Weekly sales report, week (\d+)"),
        ("total", rf"Total: ({_NUMBER})"),
        ("growth", rf"Growth: ({_NUMBER}) ?%"),
        ("top", r"Top cities: (.+)"),
    ),
    "zh": (
        ("week", r"第(\d+)周销售周报"),
        ("total", rf"总销售额：({_NUMBER})"),
        ("growth", rf"环比增长：({_NUMBER}) ?%"),
        ("top", r"销售前三城市：(.+)"),
    ),
}


def _sales_report(check: Mapping[str, Any], answer: str) -> str | None:
    language = check.get("language", "en")
    if language not in _REPORT_LINES:
        raise UserError(f"check.language is {language!r}; a sales_report is in {' or '.join(_REPORT_LINES)}")
    lines = [line.strip() for line in answer.strip().splitlines()]
    template = _REPORT_LINES[language]
    if len(lines) != len(template):
        return f"off the template: {len(template)} lines expected, {len(lines)} found"
    for (name, pattern), line in zip(template, lines, strict=True):
        expected = _need(check, name, list if name == "top" else (int, float))
        match = re.fullmatch(pattern, line)
        if match is None:
            return f"off the template: the line of the {name} is {_short(line)}"
        if name == "top":
            found: Any = [city.strip() for city in re.split(r"[,、，]", match[1])]
            same = found == expected
        else:
            found = float(match[1].replace(",", ""))
            same = math.isclose(
                found, expected, abs_tol=GROWTH_TOLERANCE if name == "growth" else 1e-6, rel_tol=0
            )
        if not same:
            shown = ", ".join(expected) if name == "top" else f"{expected:g}"
            return f"{name}: {shown} expected, {match[1]} found"
    return None


_CHECKERS: dict[str, Callable[[Mapping[str, Any], str], str | None]] = {
    "table_json": _json_equal,
    "sales_report": _sales_report,
    "json_equal": _json_equal,
    "exact": _exact,
    "contains": _contains,
    "regex": _regex,
}
