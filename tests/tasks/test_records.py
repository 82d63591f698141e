import gzip
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from molf.tasks.records import read_records, record_files, records_of


def read(path):
    """All records of a file or folder."""
    return [record for file in record_files(path) for _, record in records_of(file)]


RECORDS = [{"id": 1, "text": "one"}, {"id": 2, "text": "line\u2028separator"}]


def dump(records: list[dict], lines: bool) -> bytes:
    text = "\n".join(json.dumps(r, ensure_ascii=False) for r in records) if lines else json.dumps(records)
    return text.encode()


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz"])
def test_every_format_gives_the_same_records(tmp_path, name):
    data = dump(RECORDS, lines=".jsonl" in name)
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert read(path) == read_records(path, {"id": int, "text": str}) == RECORDS


def test_parquet_gives_the_same_records(tmp_path):
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    assert list(records_of(tmp_path / "a.parquet")) == [
        (f"{tmp_path / 'a.parquet'}, row {number}", record) for number, record in enumerate(RECORDS, start=1)
    ]


def test_csv_records_are_named_by_the_line_they_begin_on(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\n"two\nlines",b\nc,"say ""d"", please"\n', newline="")
    assert list(records_of(path)) == [
        (f"{path}, line 2", {"prompt": "two\nlines", "completion": "b"}),
        (f"{path}, line 4", {"prompt": "c", "completion": 'say "d", please'}),
    ]


def test_blank_lines_byte_order_mark_and_windows_line_ends_are_harmless(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": 1}\r\n\r\n{"id": 2}\r\n')
    assert read(path) == [{"id": 1}, {"id": 2}]


def test_a_folder_is_read_in_the_order_of_names(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"id": 2}')
    (tmp_path / "a.json").write_text('[{"id": 1}]')
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "c.jsonl").write_text('{"id": 3}')
    assert read(tmp_path) == [{"id": 1}, {"id": 2}]


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.jsonl", b'{"id": 1}\n{"id": \n', "a.jsonl, line 2: not JSON: Expecting value at column"),
        ("a.json", b'[{"id": 1},\n{"id" 2}]', "a.json: not JSON: .* at line 2, column 7"),
        ("a.json", b'{"id": 1}', "a.json: expected one list of records, found an object"),
        ("a.json", b"[{}, 3]", "a.json, record 2: expected an object with named fields, found an integer"),
        ("a.jsonl", b'{"id": 1}\n["id"]', "a.jsonl, line 2: expected an object with named fields, found a list"),
        ("a.jsonl", b'{"id": 1}\n{"id": "\xff"}', "a.jsonl, line 2: not UTF-8"),
        ("a.xlsx", b"", "a.xlsx: cannot tell the format; .* .jsonl.gz"),
        ("a.csv", b"p,c\n1,2\n3\n", "a.csv, line 3: 1 cells, but the header has 2 columns"),
        ("a.csv", b"p,c\n1,2,3,4\n", "a.csv, line 2: 4 cells, but the header has 2 columns"),
        ("a.csv", b'p,c\n"1" x,2\n', "a.csv, line 2: not CSV: ',' expected after"),
        ("a.csv", b'p,c\n1,2\n"3,4\n', "a.csv, line 3: not CSV: unexpected end of data"),
        ("a.parquet", b"p,c\n1,2\n", "a.parquet: not a whole Parquet file"),
        ("a.jsonl.gz", b'{"id": 1}', "a.jsonl.gz: not a whole gzip file"),
        # mtime: the name of a test must not hold the time at which it was collected
        ("a.jsonl.gz", gzip.compress(b'{"id": 1}' * 99, mtime=0)[:-9], "a.jsonl.gz: not a whole gzip file"),
    ],
)
def test_unusable_files_say_where_and_why(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize(
    "record, message",
    [
        ({"a": {"c": 1}, "z": 0}, "line 2: no field 'a.b'; looking for 'b' among: c"),
        ({"z": 0, "y": 1}, "line 2: no field 'a.b'; looking for 'a' among: z, y"),
        ({}, "line 2: no field 'a.b'; looking for 'a' among: nothing"),
        ({"a": "text"}, "line 2: no field 'a.b'; looking for 'b' among: a string"),
        ({"a": {"b": None}}, "line 2: field 'a.b' must be a string, found null"),
    ],
)
def test_fields_are_checked_where_they_stand(tmp_path, record, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(dump([{"a": {"b": "good"}}, record], lines=True))
    with pytest.raises(ValueError, match=re.escape(f"{path}, {message}")):
        read_records(path, {"a.b": str})


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder .*missing.json"):
        record_files(tmp_path / "missing.json")
    with pytest.raises(FileNotFoundError, match="no .json, .* file in the folder"):
        record_files(tmp_path)
