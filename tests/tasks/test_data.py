import urllib.request
from email.message import Message
from io import BytesIO
from pathlib import Path

import pytest

from molf.tasks.data import atomic_write, cache_folder, download_once, sha256


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
    return rf"cannot download .*: .*{reason}.*--data_path PATH.*--sample"


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


def test_the_sum_of_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")  # the example of FIPS 180-4
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


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
    with pytest.raises(RuntimeError), atomic_write(target) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    with atomic_write(target) as partial:
        partial.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]
