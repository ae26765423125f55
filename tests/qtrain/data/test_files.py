"""Readers: every kind of file, and every way in which one can be broken, with a clear outcome."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qtrain.data.files import iter_records
from qtrain.data.load import RowReader, detect_format, iter_rows
from qtrain.data.records import BadRow, Record
from qtrain.errors import DataError, UserError

ROW = {"instruction": "Say hi", "output": "hi"}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
# What UTF-8 can carry
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


def answers(path: str) -> list[str]:
    return [row.messages[-1].content for row in iter_rows(path)]


def places(path: str) -> list[tuple[int, str]]:
    return [
        (item.source.line, item.reason if isinstance(item, BadRow) else "") for item in iter_records(path)
    ]


@pytest.mark.parametrize(
    "text",
    ["日本語の答え", "🙂👩‍👩‍👧 and \U0001f9ff", "a\u2028b\x85c\x0bd", "tab\there\r\nand there"],
)
@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_text_comes_through_every_kind_of_file(write, tmp_path: Path, text, ending):
    rows = [{**ROW, "output": f"x{text}y"}, {**ROW, "output": "second"}]
    path = tmp_path / f"a.{ending}"
    if ending == "jsonl":
        write(path.name, rows)
    elif ending == "json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8", newline="")
    elif ending == "csv":
        quoted = "".join(f'"{row["instruction"]}","{row["output"]}"\n' for row in rows)
        path.write_bytes(f"instruction,output\n{quoted}".encode())
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    assert answers(str(path)) == [f"x{text}y", "second"]


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
def test_a_bom_and_crlf_are_tolerated(write, ending):
    row = json.dumps(ROW)
    body = {
        "jsonl": f"{row}\r\n\r\n{row}\r\n",
        "json": f"[{row},\r\n{row}]\r\n",
        "csv": "instruction,output\r\nSay hi,hi\r\nSay hi,hi\r\n",
    }[ending]
    assert answers(write(f"a.{ending}", b"\xef\xbb\xbf" + body.encode())) == ["hi", "hi"]


def test_lines_are_counted_with_the_blank_ones(write):
    path = write("a.jsonl", f"\n{json.dumps(ROW)}\n  \n{json.dumps(ROW)}")
    assert [row.source.line for row in iter_rows(path)] == [2, 4]
    assert next(str(row.source) for row in iter_rows(path)) == f"{path}:2"


def test_the_line_of_a_json_element_is_where_it_begins(write):
    path = write("a.json", json.dumps([ROW, ROW, ROW], indent=2))
    assert [row.source.line for row in iter_rows(path)] == [2, 6, 10]


def test_the_line_of_a_csv_row_is_where_it_begins(write):
    path = write("a.csv", 'instruction,output\na,"b\nb\nb"\nc,d\n')
    assert [(row.source.line, row.messages[-1].content) for row in iter_rows(path)] == [
        (2, "b\nb\nb"),
        (5, "d"),
    ]


@pytest.mark.parametrize("body", ['{"instruction":"a","output":"b"}', '{"instruction":"a",\n"output":"b"}\n'])
def test_a_json_file_may_hold_one_object_or_several(write, body):
    assert answers(write("a.json", body)) == ["b"]
    assert answers(write("b.json", body + "\n" + body)) == ["b", "b"]


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_a_line_of_ten_megabytes_is_a_row_like_any_other(write, ending):
    long = "é🙂x" * (10_000_000 // 7)
    rows = [{**ROW, "output": long}, ROW]
    body = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    assert answers(write(f"a.{ending}", body)) == [long, "hi"]


def test_a_bad_row_of_ten_megabytes_makes_a_short_message(write):
    with pytest.raises(DataError) as caught:
        list(iter_rows(write("a.jsonl", [ROW, {"instruction": "x" * 10_000_000, "y" * 10_000_000: 1}])))
    assert "a.jsonl:2: 'output' is missing" in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
@pytest.mark.parametrize("body", ["", "\n \r\n", "\ufeff"])
def test_an_empty_file_holds_no_rows(write, ending, body):
    with pytest.raises(DataError, match=rf"a\.{ending}: holds no rows$"):
        list(iter_rows(write(f"a.{ending}", body)))


def test_an_empty_array_and_a_lone_header_hold_no_rows(write):
    for path in (write("a.json", " [ ] "), write("a.csv", "instruction,output\n")):
        with pytest.raises(DataError, match="holds no rows"):
            list(iter_rows(path))


def test_invalid_utf8_is_a_bad_row_with_its_offset_and_reading_goes_on(write):
    good = json.dumps(ROW).encode()
    assert places(write("a.jsonl", good + b'\n{"a": "\xff"}\n' + good)) == [
        (1, ""),
        (2, "invalid UTF-8: byte 0xff at offset 7 of the line"),
        (3, ""),
    ]
    assert places(write("a.json", b"[" + good + b',\n{"\xc3\xa9": "\xff"},\n' + good + b"]")) == [
        (1, ""),
        (2, "invalid UTF-8: byte 0xff on line 2, at offset 8 of the row"),
        (3, ""),
    ]
    assert places(write("a.csv", b"instruction,output\na,b\na,\xe9b\na,b\n")) == [
        (2, ""),
        (3, "invalid UTF-8: byte 0xe9 at offset 0 of 'output'"),
        (4, ""),
    ]


def test_invalid_json_in_a_line_is_a_bad_row_and_reading_goes_on(write):
    bodies = ['{"a": 1,}', '{"a" 1}', '{"a": "x', "[1]", "3", '{"a": NaN}', '{"a": 1, "a": 2}', "[" * 100_000]
    found = places(write("a.jsonl", "\n".join([json.dumps(ROW), *bodies, json.dumps(ROW)])))
    assert [line for line, _ in found] == list(range(1, 11))
    reasons = [reason for _, reason in found]
    assert reasons[0] == reasons[-1] == ""
    assert reasons[1].startswith("invalid JSON at column")
    assert reasons[2].startswith("invalid JSON at column 6")
    assert "must be an object" in reasons[4]
    assert "a list" in reasons[4]
    assert "a number" in reasons[5]
    assert "NaN is not JSON" in reasons[6]
    assert "'a' stands twice" in reasons[7]
    assert "nested too deeply" in reasons[8]


def test_invalid_json_in_an_array_stops_the_reading_and_says_where(write):
    path = write("a.json", f"[{json.dumps(ROW)},\n  {{'a': 1}},\n{json.dumps(ROW)}]")
    with pytest.raises(DataError, match=r"a\.json:2: invalid JSON at column 4: .*what follows can't be read"):
        list(iter_rows(path))
    # leaving bad rows out must not lose the rest of the file in silence
    with pytest.raises(DataError, match="reading stopped"):
        list(iter_rows(path, on_problem=lambda *_: None))


@pytest.mark.parametrize("tail", ["", ",", ", {", "] ["])
def test_an_array_that_does_not_end_well_is_an_error(write, tail):
    with pytest.raises(DataError, match=r"a\.json:1: invalid JSON"):
        list(iter_rows(write("a.json", f"[{json.dumps(ROW)}{tail}")))


def test_half_a_surrogate_pair_is_a_bad_row_and_a_whole_one_is_text(write):
    path = write(
        "a.jsonl", '{"instruction":"a","output":"\\ud83d\\ude42"}\n{"instruction":"a","output":"\\ud83d"}\n'
    )
    problems: list[str] = []
    rows = list(iter_rows(path, on_problem=lambda problem, _: problems.append(problem)))
    assert [row.messages[-1].content for row in rows] == ["🙂"]
    assert problems == [f"{path}:2: 'output' holds half a character (lone surrogate \\ud83d) at 0"]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=5), JSON, max_size=4), min_size=1, max_size=6),
    indent=st.sampled_from([None, 0, 3]),
    ascii_only=st.booleans(),
    chunk=st.sampled_from([1, 7, 64]),
)
def test_the_json_reader_agrees_with_the_json_module(
    tmp_path_factory, monkeypatch, rows, indent, ascii_only, chunk
):
    monkeypatch.setattr("qtrain.data.json_files._CHUNK", chunk)
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_text(
        json.dumps(rows, indent=indent, ensure_ascii=ascii_only), "utf-8", "surrogatepass", newline=""
    )
    try:
        path.read_text("utf-8")
    except UnicodeDecodeError:
        return  # JSON text can't carry lone surrogates unescaped; those have a test of their own
    items = list(iter_records(str(path)))
    assert all(isinstance(item, Record) for item in items)
    assert [item.value for item in items] == rows


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200), ending=st.sampled_from(["jsonl", "json", "csv", "parquet"]))
def test_no_bytes_whatever_make_a_reader_crash(tmp_path_factory, data, ending):
    path = tmp_path_factory.mktemp("any") / f"a.{ending}"
    path.write_bytes(data)
    with pytest.raises(UserError):  # random bytes are never a row
        list(iter_rows(str(path)))


def test_csv_rows_of_another_width_are_bad_rows(write):
    path = write("a.csv", "instruction,output\na,b,c\na\na,b\n")
    with pytest.raises(DataError) as caught:
        list(iter_rows(path))
    assert caught.value.problems == [
        f"{path}:2: has 3 cells where the header names 2 columns",
        f"{path}:3: has 1 cells where the header names 2 columns",
    ]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("instruction;output\na;b\n", "separated by ';'"),
        ("a,a\n1,2\n", "'a' twice"),
        ("a,\n1,2\n", "without a name"),
    ],
)
def test_a_csv_header_that_can_not_be_used_is_an_error(write, body, reason):
    with pytest.raises(DataError, match=reason):
        list(iter_rows(write("a.csv", body)))


def test_csv_cells_of_messages_hold_json(write):
    path = write(
        "a.csv",
        'messages\n"[{""role"":""user"",""content"":""q""},{""role"":""assistant"",""content"":""a""}]"\n',
    )
    assert answers(path) == ["a"]


def test_names_that_can_not_be_read_are_one_line_with_the_way_out(write, tmp_path: Path):
    write("train.jsonl", [ROW])
    write("train.txt", "x")
    write("train.jsonl.gz", b"\x1f\x8b")
    cases = {
        "trian.jsonl": r"no such file; did you mean .*train\.jsonl\?",
        "nowhere/train.jsonl": "nor a folder",
        "train.txt": r"unknown kind of file '\.txt'",
        "train.jsonl.gz": "compressed",
        ".": r"is a folder.*train\.jsonl",
    }
    for name, reason in cases.items():
        with pytest.raises(UserError, match=reason) as caught:
            list(iter_rows(str(tmp_path / name)))
        assert "\n" not in str(caught.value)


def test_utf16_and_misnamed_arrays_are_named(write):
    with pytest.raises(DataError, match="is UTF-16; save it as UTF-8"):
        list(iter_rows(write("a.jsonl", json.dumps(ROW).encode("utf-16"))))
    with pytest.raises(DataError, match=r"rename it to b\.json"):
        list(iter_rows(write("b.jsonl", json.dumps([ROW]))))
    with pytest.raises(DataError, match="no parquet file"):
        list(iter_rows(write("a.parquet", b"PAR1 not really")))


def test_a_hub_name_without_a_hub_is_one_line(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"someone/something: .*the hub can't be reached.*local file"
    ) as caught:
        detect_format("someone/something")
    assert "\n" not in str(caught.value)


def test_parquet_rows_are_numbered_and_nulls_are_absent_fields(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    turns = [
        {"role": "user", "content": "q", "reasoning": None},
        {"role": "assistant", "content": "a", "reasoning": "r"},
    ]
    pq.write_table(pa.Table.from_pylist([{"messages": turns, "output": None}] * 200), tmp_path / "a.parquet")
    rows = list(iter_rows(str(tmp_path / "a.parquet")))
    assert [row.source.line for row in rows] == list(range(1, 201))
    assert rows[0].messages[1].reasoning == "r"
    assert detect_format(str(tmp_path / "a.parquet")) == ("openai", "openai: 'messages' is there")


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_reading_holds_a_small_part_of_the_file(tmp_path: Path, ending):
    row = {"instruction": "q" * 500, "output": "a" * 1500}
    count = 20_000  # 40 MB
    path = tmp_path / f"a.{ending}"
    if ending == "jsonl":
        path.write_text((json.dumps(row) + "\n") * count)
    elif ending == "json":
        path.write_text("[" + ",\n".join([json.dumps(row)] * count) + "]")
    elif ending == "csv":
        path.write_text("instruction,output\n" + f"{row['instruction']},{row['output']}\n" * count)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist([row] * count), path, use_dictionary=False, compression="none")
    tracemalloc.start()
    reader = RowReader(str(path))
    assert sum(1 for _ in reader) == count
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size > 39_000_000
    assert peak < 10_000_000
