"""Formats: what each row becomes, how it is recognised, and why a row can't be used."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtrain.data.formats import FORMATS, detect, parse
from qtrain.data.load import MixedFormats, detect_format, iter_rows
from qtrain.data.records import Record
from qtrain.data.rows import Message, Source
from qtrain.data.turns import RowError
from qtrain.errors import DataError, UserError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
PLAIN = TEXT.filter(lambda text: "</think>" not in text)


def U(text):
    return Message("user", text)


def A(text):
    return Message("assistant", text)


def S(text):
    return Message("system", text)


def rows_of(row):
    found = detect(row)
    assert found is not None
    return parse(Record(row, Source("a.jsonl", 1)), found[0])


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def said(who, value):
    return {"from": who, "value": value}


@pytest.mark.parametrize(
    ("row", "name", "messages"),
    [
        ({"instruction": "i", "input": "", "output": "o"}, "alpaca", (U("i"), A("o"))),
        ({"instruction": "i", "input": "x", "output": "o"}, "alpaca", (U("i\n\nx"), A("o"))),
        (
            {"instruction": "i", "output": "o", "reasoning": "r"},
            "alpaca",
            (U("i"), Message("assistant", "o", "r")),
        ),
        ({"instruction": "i", "output": "o", "system": "s"}, "alpaca", (S("s"), U("i"), A("o"))),
        ({"instruction": "i", "context": "c", "response": "r"}, "dolly", (U("i\n\nc"), A("r"))),
        ({"instruction": "i", "context": None, "response": "r"}, "dolly", (U("i"), A("r"))),
        (
            {"conversations": [said("human", "h"), said("gpt", "g")], "system": "s"},
            "sharegpt",
            (S("s"), U("h"), A("g")),
        ),
        (
            {
                "conversations": [
                    said("system", "s"),
                    said("human", "h"),
                    said("function_call", "f"),
                    said("observation", "t"),
                    said("gpt", "g"),
                ]
            },
            "sharegpt",
            (S("s"), U("h"), A("f"), Message("tool", "t"), A("g")),
        ),
        (
            {
                "messages": [
                    turn("developer", "s"),
                    turn("user", "u"),
                    turn("assistant", "a", reasoning_content="r"),
                    turn("user", [{"type": "text", "text": "v"}]),
                    turn("assistant", "b"),
                ]
            },
            "openai",
            (S("s"), U("u"), Message("assistant", "a", "r"), U("v"), A("b")),
        ),
        (
            {"messages": [turn("user", "u"), turn("assistant", "<think>\nwhy\n</think>\n\nyes")]},
            "openai",
            (U("u"), Message("assistant", "yes", "why")),
        ),
    ],
)
def test_a_conversation_of_each_format(row, name, messages):
    found = detect({**row, "id": 5, "check": {"kind": "k"}})
    assert found is not None
    assert found[0].name == name
    (parsed,) = rows_of({**row, "id": 5, "check": {"kind": "k"}})
    assert parsed.messages == messages
    assert parsed.extra == {"id": 5, "check": {"kind": "k"}}


def test_self_instruct_gives_a_conversation_for_each_instance():
    row = {
        "instruction": "i",
        "instances": [{"input": "", "output": "1"}, {"input": "x", "output": "2"}],
        "id": "t",
    }
    first, second = rows_of(row)
    assert first.messages == (U("i"), A("1"))
    assert second.messages == (U("i\n\nx"), A("2"))
    assert first.extra == {"id": "t"}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, (U("p"),)),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "system": "s"}, (S("s"), U("p"))),
        (
            {"prompt": [turn("system", "s"), turn("user", "p")], "chosen": "c", "rejected": "r"},
            (S("s"), U("p")),
        ),
        (
            {"prompt": "p", "chosen": [turn("assistant", "c")], "rejected": [turn("assistant", "r")]},
            (U("p"),),
        ),
        (
            {
                "chosen": [turn("user", "p"), turn("assistant", "c")],
                "rejected": [turn("user", "p"), turn("assistant", "r")],
            },
            (U("p"),),
        ),
        (
            {
                "prompt": "p",
                "chosen": [turn("system", "s"), turn("user", "p"), turn("assistant", "c")],
                "rejected": [turn("system", "s"), turn("user", "p"), turn("assistant", "r")],
            },
            (S("s"), U("p")),
        ),
    ],
)
def test_a_preference_pair_in_each_spelling(row, prompt):
    (pair,) = rows_of({**row, "score": 1})
    assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, (A("c"),), (A("r"),))
    assert pair.extra == {"score": 1}


def test_the_longest_shared_beginning_is_the_prompt():
    shared = [turn("user", "1"), turn("assistant", "2"), turn("user", "3")]
    row = {
        "chosen": [*shared, turn("assistant", "c", reasoning="why")],
        "rejected": [*shared, turn("assistant", "r")],
    }
    (pair,) = rows_of(row)
    assert pair.prompt == (U("1"), A("2"), U("3"))
    assert pair.chosen == (Message("assistant", "c", "why"),)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "i", "output": 3}, "'output' is a number and must be a string"),
        ({"instruction": "i", "output": ["x"]}, "'output' is a list and must be a string"),
        ({"instruction": "i", "output": None}, "'output' is null"),
        ({"instruction": "i", "output": True}, "'output' is a boolean"),
        ({"instruction": "", "output": "o"}, "'instruction' is empty"),
        ({"instruction": "i", "output": " \n"}, "'output' is blank"),
        ({"instruction": "i", "input": 4, "output": "o"}, "'input' is a number"),
        (
            {"instruction": "i", "reasoning": "r", "output": "<think>x</think>o"},
            "a <think> block in its text as well",
        ),
        ({"instruction": "i", "instances": []}, "'instances' is an empty list"),
        ({"instruction": "i", "instances": [{"output": "o"}, {"output": ""}]}, "number 2: 'output' is empty"),
        ({"messages": []}, "'messages' is an empty list"),
        ({"messages": "hi"}, "'messages' is a string and must be a list"),
        ({"messages": [turn("user", "u")]}, "no assistant turn"),
        ({"messages": [turn("assistant", "a")]}, "the first turn is the assistant's"),
        (
            {"messages": [turn("user", "u"), turn("user", "v"), turn("assistant", "a")]},
            "turns 1 and 2 are both the user's",
        ),
        (
            {"messages": [turn("user", "u"), turn("assistant", "a"), turn("assistant", "b")]},
            "both the assistant's",
        ),
        (
            {"messages": [turn("user", "u"), turn("system", "s"), turn("assistant", "a")]},
            "turn 2 is a system message",
        ),
        (
            {"messages": [turn("user", "u"), turn("tool", "s"), turn("assistant", "a")]},
            "the tool's and can't follow",
        ),
        ({"messages": [turn("usr", "u")]}, "unknown role 'usr'"),
        ({"messages": [turn("user", "u"), turn("assistant", None, tool_calls=[{}])]}, "has 'tool_calls'"),
        ({"messages": [turn("user", "u"), turn("assistant", None)]}, "turn 2 (assistant): 'content' is null"),
        ({"messages": [turn("user", [{"type": "image_url"}])]}, "a part that is no text (image_url)"),
        (
            {"messages": [turn("user", "u", reasoning="r"), turn("assistant", "a")]},
            "only an assistant's turn",
        ),
        ({"messages": [{"content": "u"}]}, "turn 1 has no 'role'"),
        ({"messages": [{"role": "user"}]}, "turn 1 (user) has no 'content'"),
        ({"prompt": "p", "chosen": "c", "rejected": "c "}, "'chosen' and 'rejected' are the same"),
        ({"prompt": "p", "chosen": "", "rejected": "r"}, "'chosen' is empty"),
        ({"prompt": "", "chosen": "c", "rejected": "r"}, "'prompt' is empty"),
        ({"chosen": "c", "rejected": "r"}, "'prompt' is missing"),
        ({"prompt": "p", "chosen": "c", "rejected": 1}, "'rejected' is a number"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "reasoning": "x"}, "belongs inside the turns"),
        (
            {"prompt": [turn("user", "u"), turn("assistant", "a")], "chosen": "c", "rejected": "r"},
            "the prompt ends with",
        ),
        (
            {
                "chosen": [turn("user", "p"), turn("assistant", "c")],
                "rejected": [turn("user", "q"), turn("assistant", "r")],
            },
            "do not share their prompt",
        ),
        (
            {
                "prompt": "other",
                "chosen": [turn("user", "p"), turn("assistant", "c")],
                "rejected": [turn("user", "p"), turn("assistant", "r")],
            },
            "'prompt' differs",
        ),
        (
            {
                "prompt": "p",
                "chosen": [turn("assistant", "c"), turn("user", "x"), turn("assistant", "y")],
                "rejected": "r",
            },
            "'chosen' has 3 turns",
        ),
    ],
)
def test_why_a_row_can_not_be_used(row, reason):
    with pytest.raises(RowError, match=re.escape(reason)):
        rows_of(row)


@given(
    instruction=TEXT,
    context=st.text(st.characters(exclude_categories=["Cs"])),
    output=PLAIN,
)
def test_alpaca_keeps_every_character(instruction, context, output):
    (row,) = rows_of({"instruction": instruction, "input": context, "output": output})
    assert row.messages[-1].content == output
    assert row.messages[0].content == (f"{instruction}\n\n{context}" if context.strip() else instruction)


@given(turns=st.lists(PLAIN, min_size=2, max_size=8))
def test_sharegpt_and_openai_say_the_same(turns):
    names = [("human", "user"), ("gpt", "assistant")]
    (share,) = rows_of({"conversations": [said(names[i % 2][0], text) for i, text in enumerate(turns)]})
    (openai,) = rows_of({"messages": [turn(names[i % 2][1], text) for i, text in enumerate(turns)]})
    assert share.messages == openai.messages
    assert [message.content for message in share.messages] == turns


def test_the_reason_of_a_format_is_told(write):
    path = write("a.jsonl", [{"instruction": "i", "output": "o", "reasoning": "r"}])
    assert detect_format(path) == ("alpaca", "alpaca: 'instruction', 'output' and 'reasoning' are there")


def test_all_bad_rows_are_told_at_once(write):
    good = {"instruction": "i", "output": "o"}
    path = write("a.jsonl", [good, {"instruction": "i"}, good, {"output": "o"}, {"x": 1}])
    with pytest.raises(DataError, match="3 bad rows of 5") as caught:
        list(iter_rows(path))
    assert [problem.split(": ")[0] for problem in caught.value.problems] == [
        f"{path}:{line}" for line in (2, 4, 5)
    ]


def test_bad_rows_go_to_the_handler_with_what_stood_there(write):
    path = write("a.jsonl", b'{"instruction":"i","output":"o"}\n{"instruction":"i"}\n{oops\n')
    seen: list[tuple[str, object]] = []
    assert len(list(iter_rows(path, on_problem=lambda problem, raw: seen.append((problem, raw))))) == 1
    assert [raw for _, raw in seen] == [{"instruction": "i"}, b"{oops"]


def test_a_file_that_mixes_formats_names_the_first_row_of_each(write):
    alpaca, dolly = {"instruction": "i", "output": "o"}, {"instruction": "i", "response": "o"}
    path = write("a.jsonl", [alpaca, alpaca, dolly, alpaca, dolly])
    for handler in (None, lambda *_: None):
        with pytest.raises(MixedFormats, match="mixes 2 formats") as caught:
            list(iter_rows(path, on_problem=handler))
        assert caught.value.problems == [
            f"{path}:1: the first of 3 alpaca rows",
            f"{path}:3: the first of 2 dolly rows",
        ]
    assert len(list(iter_rows(path, format="alpaca", on_problem=lambda *_: None))) == 3


def test_unknown_formats_are_told_what_is_known(write):
    with pytest.raises(
        DataError, match=r"a\.jsonl:1: fits no known format: its columns are 'text'"
    ) as caught:
        list(iter_rows(write("a.jsonl", [{"text": "hello"}])))
    assert all(name in str(caught.value) for name in FORMATS)
    with pytest.raises(UserError, match="format 'alpacca' is unknown"):
        list(iter_rows(write("b.jsonl", [{"text": "hello"}]), format="alpacca"))
