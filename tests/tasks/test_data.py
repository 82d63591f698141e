import gzip
import json
import re
import urllib.request
from email.message import Message
from io import BytesIO
from pathlib import Path

import pytest

from molf.tasks.data import cache_folder, download_once, read_records, written_whole

RECORDS = [{"id": 1, "text": "one"}, {"id": 2, "text": "line\u2028separator"}]


def dump(records: list[dict], lines: bool) -> bytes:
    text = "\n".join(json.dumps(r, ensure_ascii=False) for r in records) if lines else json.dumps(records)
    return text.encode()


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz"])
def test_every_format_gives_the_same_records(tmp_path, name):
    data = dump(RECORDS, lines=".jsonl" in name)
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert read_records(path) == RECORDS
    assert read_records(str(path), {"id": int, "text": str}) == RECORDS


def test_blank_lines_byte_order_mark_and_windows_line_ends_are_harmless(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": 1}\r\n\r\n{"id": 2}\r\n')
    assert read_records(path) == [{"id": 1}, {"id": 2}]


def test_a_folder_is_read_in_the_order_of_names(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"id": 2}')
    (tmp_path / "a.json").write_text('[{"id": 1}]')
    (tmp_path / "README.md").write_text("not data")
    assert read_records(tmp_path) == [{"id": 1}, {"id": 2}]


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.jsonl", b'{"id": 1}\n{"id": \n', "a.jsonl, line 2: not JSON: Expecting value at column"),
        ("a.json", b'[{"id": 1},\n{"id" 2}]', "a.json: not JSON: .* at line 2, column 7"),
        ("a.json", b'{"id": 1}', "a.json: expected one list of records, found an object"),
        ("a.json", b"[{}, 3]", "a.json, record 2: expected an object with named fields, found an integer"),
        ("a.jsonl", b'{"id": 1}\n["id"]', "a.jsonl, line 2: expected an object with named fields, found a list"),
        ("a.jsonl", b'{"id": 1}\n{"id": "\xff"}', "a.jsonl, line 2: not UTF-8"),
        ("a.jsonl", b"\n\n", "a.jsonl: no records"),
        ("a.json", b"[]", "a.json: no records"),
        ("a.csv", b"id\n1", "a.csv: cannot tell the format; .* .jsonl.gz"),
        ("a.jsonl.gz", b'{"id": 1}', "a.jsonl.gz: not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"id": 1}' * 99)[:-9], "a.jsonl.gz: not a whole gzip file"),
    ],
)
def test_unusable_files_say_where_and_why(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_records(tmp_path / name)


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
        read_records(tmp_path / "missing.json")
    with pytest.raises(FileNotFoundError, match="no .json, .* file in the folder"):
        read_records(tmp_path)


@pytest.fixture
def online(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)


def test_a_file_is_downloaded_once(tmp_path, online):
    source = tmp_path / "published.json"
    source.write_text("[1]")
    copy = download_once(source.as_uri(), tmp_path / "cache" / "fact")
    assert copy == tmp_path / "cache" / "fact" / "published.json"
    source.write_text("[2]")
    assert download_once(source.as_uri(), copy.parent) == copy
    assert copy.read_text() == "[1]"
    assert list(copy.parent.iterdir()) == [copy]


def both_ways_out(reason: str) -> str:
    return rf"cannot download .*: .*{reason}.*--data_path FILE.*--sample"


def test_a_failed_download_leaves_nothing_and_says_what_to_do(tmp_path, online):
    with pytest.raises(ConnectionError, match=both_ways_out("No such file")):
        download_once((tmp_path / "missing.json").as_uri(), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_download_that_breaks_off_leaves_nothing(tmp_path, online, monkeypatch):
    class Response(BytesIO):
        headers = Message()

    Response.headers["Content-Length"] = "10"
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: Response(b"12345"))
    with pytest.raises(ConnectionError, match=both_ways_out("got 5 of 10 bytes")):
        download_once("https://example.org/a.json", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("switch", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"])
def test_offline_means_offline_but_a_copy_is_used(tmp_path, online, monkeypatch, switch):
    def no_network(url, timeout):
        raise AssertionError("tried the network")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    monkeypatch.setenv(switch, "1")
    with pytest.raises(ConnectionError, match=both_ways_out(f"{switch} is set")):
        download_once("https://example.org/a.json", tmp_path)
    (tmp_path / "a.json").write_text("[]")
    assert download_once("https://example.org/a.json", tmp_path) == tmp_path / "a.json"


def test_the_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("MOLF_CACHE", raising=False)
    assert cache_folder() == Path("/home/someone/.cache/molf")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/xdg")
    assert cache_folder() == Path("/var/xdg/molf")
    monkeypatch.setenv("MOLF_CACHE", "~/mine")
    assert cache_folder() == Path("/home/someone/mine")


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), written_whole(target) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    with written_whole(target) as partial:
        partial.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]
