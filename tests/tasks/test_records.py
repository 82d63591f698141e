import gzip
import json
import re

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from molf.errors import MolfError
from molf.tasks.records import UNNAMED, check_fields, local_splits, records_of


def read(path):
    """All records of a file or folder."""
    return [record for _, record in local_splits(path)[UNNAMED]]


RECORDS = [{"id": 1, "text": "one"}, {"id": 2, "text": "line\u2028separator"}]


def dump(records: list[dict], lines: bool) -> bytes:
    text = "\n".join(json.dumps(r, ensure_ascii=False) for r in records) if lines else json.dumps(records)
    return text.encode()


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz"])
def test_every_format_gives_the_same_records(tmp_path, name):
    data = dump(RECORDS, lines=".jsonl" in name)
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert read(path) == RECORDS


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
        ("a.parquet", b"p,c\n1,2\n", "a.parquet: not a complete Parquet file"),
        ("a.jsonl.gz", b'{"id": 1}', "a.jsonl.gz: not a complete gzip file"),
        # mtime: the name of a test must not hold the time at which it was collected
        ("a.jsonl.gz", gzip.compress(b'{"id": 1}' * 99, mtime=0)[:-9], "a.jsonl.gz: not a complete gzip file"),
    ],
)
def test_unusable_files_say_where_and_why(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(MolfError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize(
    "record, message",
    [
        ({"a": {"c": 1}, "z": 0}, "no field 'a.b'; 'b' is missing from: c"),
        ({"z": 0, "y": 1}, "no field 'a.b'; 'a' is missing from: z, y"),
        ({}, "no field 'a.b'; 'a' is missing from: nothing"),
        ({"a": "text"}, "no field 'a.b'; 'b' is missing from: a string"),
        ({"a": {"b": None}}, "field 'a.b' must be a string, found null"),
    ],
)
def test_fields_are_checked_where_they_stand(record, message):
    check_fields({"a": {"b": "good"}}, {"a.b": str}, "x.jsonl, line 1")
    with pytest.raises(MolfError, match=re.escape(f"x.jsonl, line 2: {message}")):
        check_fields(record, {"a.b": str}, "x.jsonl, line 2")


def test_nothing_there(tmp_path):
    with pytest.raises(MolfError, match="no file or folder .*missing.json"):
        local_splits(tmp_path / "missing.json")
    with pytest.raises(MolfError, match="no .json, .* file in the folder"):
        local_splits(tmp_path)


# --- folders by split ---


def write(path, *numbers):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"n": n}) + "\n" for n in numbers))


def numbers(splits):
    return {split: [row["n"] for _, row in rows] for split, rows in splits.items()}


def test_names_tell_the_split(tmp_path):
    write(tmp_path / "train-00000-of-00002.jsonl", 1)
    write(tmp_path / "train-00001-of-00002.jsonl", 2)
    write(tmp_path / "medmcqa_dev.jsonl", 3)
    write(tmp_path / "test" / "part.jsonl", 4)
    assert numbers(local_splits(tmp_path)) == {"train": [1, 2], "validation": [3], "test": [4]}


def test_names_that_tell_nothing_are_one_split(tmp_path):
    write(tmp_path / "b.jsonl", 2)
    write(tmp_path / "contest.jsonl", 3)  # no word of a split
    write(tmp_path / "a.jsonl", 1)
    assert numbers(local_splits(tmp_path)) == {UNNAMED: [1, 2, 3]}
    assert numbers(local_splits(tmp_path / "b.jsonl")) == {UNNAMED: [2]}


def test_a_file_without_a_split_among_others_is_refused(tmp_path):
    write(tmp_path / "train.jsonl", 1)
    write(tmp_path / "extra.jsonl", 2)
    with pytest.raises(MolfError, match="extra.jsonl: cannot tell the split; .* train, training, validation"):
        local_splits(tmp_path)


def saved(folder):
    """Two splits as ``datasets`` saves them."""
    of = datasets.Dataset.from_list
    both = datasets.DatasetDict({"train": of([{"n": 1}, {"n": 2}]), "valid": of([{"n": 3}])})
    both.save_to_disk(folder / "both")
    both["train"].save_to_disk(folder / "one")


def test_folders_that_datasets_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    saved(tmp_path)
    assert numbers(local_splits(tmp_path / "both")) == {"train": [1, 2], "validation": [3]}
    (where, row), _ = local_splits(tmp_path / "one")[UNNAMED]
    assert (where, row) == (f"{tmp_path / 'one'}, row 1", {"n": 1})
