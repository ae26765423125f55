"""An answer is right or not, and the reason names what is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from qtrain.errors import UserError
from qtrain.evaluation.checks import check_answer, default_check, strip_thinking

TABLE = {"kind": "table_json", "expected": [{"city": "Rome", "sales": 12}, {"city": "Oslo", "sales": 7}]}
RIGHT_TABLE = '[{"city": "Rome", "sales": 12}, {"city": "Oslo", "sales": 7}]'
REPORT = {
    "kind": "sales_report",
    "language": "en",
    "week": 7,
    "total": 1204,
    "growth": -12.5,
    "top": ["Rome", "Oslo", "Lima"],
}
RIGHT_REPORT = "Weekly sales report, week 7\nTotal: 1204\nGrowth: -12.5%\nTop cities: Rome, Oslo, Lima"


@pytest.mark.parametrize(
    "answer",
    [
        RIGHT_TABLE,
        f"```json\n{RIGHT_TABLE}\n```",
        f"```\n{RIGHT_TABLE}```\n",
        f"<think>\nTwo rows.\n</think>\n\n{RIGHT_TABLE}",
        '[{"sales": 12.0, "city": "Rome"},\n {"city": "Oslo", "sales": 7}]',
    ],
)
def test_a_table_is_right_by_value(answer: str) -> None:
    result = check_answer(TABLE, answer)
    assert result.passed
    assert result.reason == ""


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (RIGHT_TABLE.replace("12", "13"), "$[0].sales: 12 expected, 13 found"),
        (RIGHT_TABLE.replace("12", '"12"'), '$[0].sales: 12 expected, "12" found'),
        (RIGHT_TABLE.replace("12", "true"), "$[0].sales: 12 expected, true found"),
        (RIGHT_TABLE.replace("Oslo", "oslo"), '$[1].city: "Oslo" expected, "oslo" found'),
        ('[{"city": "Rome", "sales": 12}]', "$: 2 items expected, 1 found"),
        (RIGHT_TABLE.replace("7}", '7, "x": 1}'), "$[1]: key 'x' is too much"),
        (RIGHT_TABLE.replace(', "sales": 7', ""), "$[1]: key 'sales' is missing"),
        ('{"rows": []}', '$: [{"city": "Rome", "sales": 12}, {"city": "Oslo", "sales":... expected, '),
        (RIGHT_TABLE[:-1], "not valid JSON: "),
        (RIGHT_TABLE.replace("12", "NaN"), "not valid JSON: NaN"),
        (RIGHT_TABLE.replace('"city": "Rome"', '"sales": 12'), "not valid JSON: a key occurs twice"),
        ("[" * 100_000, "not valid JSON: "),
        (f"Here you are:\n{RIGHT_TABLE}", "not valid JSON: "),
        (f"```json\n{RIGHT_TABLE}\n```\nAnything else?", "not valid JSON: "),
        (" \n", "the answer is empty"),
        (f"<think>\n{RIGHT_TABLE}", "the answer is empty"),
    ],
)
def test_a_wrong_table_is_told_what_is_wrong(answer: str, reason: str) -> None:
    result = check_answer(TABLE, answer)
    assert not result.passed
    assert result.reason.startswith(reason)
    assert "\n" not in result.reason


@pytest.mark.parametrize(
    "answer",
    [
        RIGHT_REPORT,
        RIGHT_REPORT.replace("1204", "1,204").replace("%", " %"),
        f"<think>\nTotal: 9\n</think>\n\n{RIGHT_REPORT}\n",
        RIGHT_REPORT.replace("\n", " \r\n"),
    ],
)
def test_a_report_is_right_by_its_figures(answer: str) -> None:
    assert check_answer(REPORT, answer).passed


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("1204", "1240", "total: 1204 expected, 1240 found"),
        ("-12.5", "12.5", "growth: -12.5 expected, 12.5 found"),
        ("-12.5", "-12.54", None),  # the truth may be rounded to one decimal
        ("-12.5", "-12.6", "growth: -12.5 expected, -12.6 found"),
        ("week 7", "week 8", "week: 7 expected, 8 found"),
        ("Rome, Oslo", "Oslo, Rome", "top: Rome, Oslo, Lima expected, Oslo, Rome, Lima found"),
        (", Lima", "", "top: Rome, Oslo, Lima expected, Rome, Oslo found"),
        ("Total: ", "Sum: ", "off the template: the line of the total is"),
        ("Total: 1204\n", "", "off the template: 4 lines expected, 3 found"),
        ("Weekly", "Sure!\nWeekly", "off the template: 4 lines expected, 5 found"),
    ],
)
def test_a_wrong_report_is_told_what_is_wrong(old: str, new: str, reason: str | None) -> None:
    result = check_answer(REPORT, RIGHT_REPORT.replace(old, new))
    assert result.passed == (reason is None)
    assert result.reason.startswith(reason or "")


def test_a_chinese_report() -> None:
    check = {**REPORT, "language": "zh", "top": ["北京", "上海", "广州"]}
    answer = "第7周销售周报\n总销售额：1204\n环比增长：-12.5%\n销售前三城市：北京、上海、广州"
    assert check_answer(check, answer).passed
    assert check_answer(check, answer.replace("1204", "1205")).reason == "total: 1204 expected, 1205 found"


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        ({"kind": "json_equal", "expected": {"a": [1, None]}}, '{"a": [1, null]}', '{"a": [1]}'),
        ({"kind": "exact", "expected": "two  words"}, " two\nwords ", "two word"),
        ({"kind": "contains", "expected": ["one", "two"]}, "two, one", "one"),
        ({"kind": "contains", "expected": "one"}, "none", "no"),
        ({"kind": "regex", "pattern": r"\d+ days?"}, " 12 days\n", "about 12 days"),
    ],
)
def test_kinds_for_ones_own_data(check: dict[str, Any], right: str, wrong: str) -> None:
    assert check_answer(check, right).passed
    result = check_answer(check, wrong)
    assert not result.passed
    assert result.reason


@pytest.mark.parametrize(
    ("check", "message"),
    [
        ({"kind": "table_jsn", "expected": []}, "unknown kind 'table_jsn'; did you mean 'table_json'?"),
        ({}, "unknown kind None; the kinds are table_json, "),
        ({"kind": "exact"}, "check.expected is missing; a check of kind 'exact' needs it"),
        ({"kind": "exact", "expected": 3}, "check.expected is 3, which"),
        ({"kind": "regex", "pattern": "("}, "check.pattern '(' is no regular expression"),
        ({**REPORT, "language": "fr"}, "check.language is 'fr'"),
        ({**REPORT, "week": True}, "check.week is True"),
    ],
)
def test_a_bad_check_is_the_users_mistake(check: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as info:
        check_answer(check, RIGHT_REPORT)
    assert message in str(info.value)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("reference", "check"),
    [
        ('{"a": 1}', {"kind": "json_equal", "expected": {"a": 1}}),
        ("<think>\nhm\n</think>\n\n[1]", {"kind": "json_equal", "expected": [1]}),
        ("42", {"kind": "exact", "expected": "42"}),  # JSON, but a word to most people
        ("plain words", {"kind": "exact", "expected": "plain words"}),
    ],
)
def test_the_default_check_follows_the_reference(reference: str, check: dict[str, Any]) -> None:
    assert default_check(reference) == check
    assert check_answer(check, reference).passed


def test_only_a_leading_think_block_is_stripped() -> None:
    assert strip_thinking(" <think>a</think>\n\nb") == "b"
    assert strip_thinking("b <think>a</think>") == "b <think>a</think>"
    assert strip_thinking("<think>never closed") == ""
