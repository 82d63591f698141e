import bz2
import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from molf.errors import MolfError
from molf.tasks.formats import records_of
from molf.tasks.records import UNNAMED, local_splits


def read(path):
    """All records of a file or folder."""
    return [record for _, record in local_splits(path)[UNNAMED]]


RECORDS = [{"id": 1, "text": "one"}, {"id": 2, "text": "line\u2028separator"}]


def dump(records: list[dict], lines: bool) -> bytes:
    text = "\n".join(json.dumps(r, ensure_ascii=False) for r in records) if lines else json.dumps(records)
    return text.encode()


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson", "a.JSONL"])
def test_every_format_gives_the_same_records(tmp_path, name, compression):
    path = tmp_path / (name + compression)
    path.write_bytes(COMPRESS[compression](dump(RECORDS, lines="l" in name.lower() or "nd" in name)))
    assert read(path) == RECORDS


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("name, separator", [("a.csv", ","), ("a.v2.TSV", "\t")])
def test_tables_give_the_same_records(tmp_path, name, separator, compression):
    long = "x" * 200_000  # longer than the csv module takes by itself
    text = f'\n\nprompt{separator}completion\nq,"{separator}"\n"two\nlines"{separator}{long}\n'
    text = text.replace("q,", f"q{separator}")
    path = tmp_path / (name + compression)
    path.write_bytes(COMPRESS[compression](text.encode()))
    assert list(records_of(path)) == [
        (f"{path}, line 4", {"prompt": "q", "completion": separator}),
        (f"{path}, line 5", {"prompt": "two\nlines", "completion": long}),
    ]


def test_json_lines_named_json_are_read_and_located(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(dump(RECORDS, lines=True))
    assert list(records_of(path)) == [(f"{path}, line {number}", one) for number, one in enumerate(RECORDS, start=1)]
    path.write_text('{"id": 1}\n{"id": \n')
    with pytest.raises(MolfError, match="a.json, line 2: not JSON"):
        read(path)


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
        ("a.csv", b"p,c\n1,2\n\n\n3\n", "a.csv, line 5: 1 cells, but the header has 2 columns"),
        ("a.csv", b"p,c,c\n1,2,3\n", "a.csv, line 1: the column 'c' occurs twice"),
        ("a.tsv", b"c\tc\n1\t2\n", "a.tsv, line 1: the column 'c' occurs twice"),
        ("a.tsv", b'p\tc\n"1" x\t2\n', "a.tsv, line 2: not TSV"),
        ("a.jsonl", b'{"id": 1}\n{"a": {"b": 1, "b": 2}}', "a.jsonl, line 2: the name 'b' occurs twice"),
        ("a.json", b'[{"id": 1}, {"id": "\\uD83D"}]', r"a.json, record 2: \\ud83d is half of a character"),
        ("a.jsonl", b'{"\\udE00": 1}', r"a.jsonl, line 1: \\ude00 is half of a character"),
        ("a.jsonl", b'{"id": ' + b"9" * 5000 + b"}", "a.jsonl, line 1: Exceeds the limit"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1: lists and objects are nested too deeply"),
        ("a.parquet", b"p,c\n1,2\n", "a.parquet: not a complete Parquet file"),
        ("a.parquet.gz", b"", "a.parquet.gz: cannot tell the format"),
        ("a.jsonl.gz", b'{"id": 1}', "a.jsonl.gz: not a complete gzip file"),
        # mtime: the name of a test must not hold the time at which it was collected
        ("a.jsonl.gz", gzip.compress(b'{"id": 1}' * 99, mtime=0)[:-9], "a.jsonl.gz: not a complete gzip file"),
        ("a.csv.bz2", bz2.compress(b"p,c\n1,2\n")[:-9], "a.csv.bz2: not a complete bzip2 file"),
        ("a.csv.xz", lzma.compress(b"p,c\n1,2\n")[:-9], "a.csv.xz: not a complete xz file"),
        ("a.csv.bz2", bz2.compress(b"p,c\n1,2\n") + b"3,4\n", "a.csv.bz2: not a complete bzip2 file"),
        ("a.csv.xz", lzma.compress(b"p,c\n1,2\n") + b"3,4\n", "a.csv.xz: not a complete xz file"),
        ("a.json.zst", zstd(b'[{"id": 1}]' * 99)[:-9], "a.json.zst: not a complete Zstandard file"),
    ],
)
def test_unusable_files_say_where_and_why(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(MolfError, match=message):
        read(tmp_path / name)


def test_damaged_and_ambiguous_parquet_is_refused(tmp_path):
    table = pa.table({"p": [f"a long text {number}" for number in range(999)]})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, compression="none", use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[4:400] = b"\xff" * 396  # the first page, not the footer
    path.write_bytes(data)
    with pytest.raises(MolfError, match="a.parquet: not a complete Parquet file"):
        read(path)
    pq.write_table(pa.Table.from_arrays([table["p"], table["p"]], names=["p", "p"]), path)
    with pytest.raises(MolfError, match="a.parquet: the column 'p' occurs twice"):
        read(path)


@pytest.mark.parametrize(("ending", "padding"), [(".gz", b""), (".bz2", b""), (".xz", b"\0" * 4)])
def test_streams_one_after_another_are_all_read(tmp_path, ending, padding):
    compress = COMPRESS[ending]
    (tmp_path / f"a.jsonl{ending}").write_bytes(compress(b'{"n": 1}\n') + padding + compress(b'{"n": 2}') + padding)
    assert read(tmp_path / f"a.jsonl{ending}") == [{"n": 1}, {"n": 2}]
