import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from molf.errors import MolfError
from molf.files import NotWritable, atomic_folder, atomic_write, cache_folder, read_json, typed


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "file"
    for content in ("first", "second"):
        with atomic_write(target) as partial:
            partial.write_text(content)
            assert not target.exists() or target.read_text() == "first"
        assert target.read_text() == content
    with pytest.raises(RuntimeError), atomic_write(target) as partial:
        partial.write_text("third")
        raise RuntimeError
    assert target.read_text() == "second" and os.listdir(tmp_path) == ["file"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file" / "x.csv", tmp_path):
        with pytest.raises(MolfError, match=f"cannot write {target}: .*; choose another path"), atomic_write(target):
            raise AssertionError("nothing is written")


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "new" / "folder"
    with pytest.raises(RuntimeError), atomic_folder(target) as partial:
        (partial / "file").write_text("incomplete")
        raise RuntimeError
    assert os.listdir(target.parent) == []
    with atomic_folder(target) as partial:
        (partial / "file").write_text("complete")
        assert not target.exists()
    assert (target / "file").read_text() == "complete" and os.listdir(target.parent) == ["folder"]
    with pytest.raises(OSError, match="not empty"), atomic_folder(target):
        pass
    assert (target / "file").read_text() == "complete"


def write(target, content="new"):
    with atomic_write(target) as partial:
        partial.write_text(content)


def test_a_symlink_stays_and_the_file_that_it_names_is_written(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link, real = tmp_path / "link", tmp_path / "elsewhere" / "real"
    for name in (link, tmp_path / "chain"):
        name.symlink_to(real if name is link else link)
        for content in ("made", "replaced"):
            write(name, content)
            assert name.is_symlink() and not real.is_symlink() and real.read_text() == content
    assert os.listdir(real.parent) == ["real"]
    (tmp_path / "folder").symlink_to(tmp_path / "elsewhere" / "new")
    with atomic_folder(tmp_path / "folder") as partial:
        (partial / "file").write_text("complete")
    assert (tmp_path / "elsewhere" / "new" / "file").read_text() == "complete"
    link.unlink()
    link.symlink_to(link)
    with pytest.raises(NotWritable, match="symbolic links"):
        write(link)


@pytest.mark.parametrize("mode", [0o600, 0o666, 0o640])
def test_a_replaced_file_keeps_its_mode_and_owner(mode, tmp_path, monkeypatch):
    target = tmp_path / "file"
    target.write_text("older and longer")
    target.chmod(mode)
    if os.getuid() == 0:
        os.chown(target, 12, 34)
    before = target.stat()
    write(target)
    after = target.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert after.st_ino != before.st_ino and target.read_text() == "new"

    # An owner that cannot be given away stays: the file is written in place.
    monkeypatch.setattr("shutil.copystat", Raises(PermissionError))
    write(target, "newer")
    assert target.stat().st_ino == after.st_ino and target.read_text() == "newer"


class Raises:
    def __init__(self, error):
        self.error = error

    def __call__(self, *given):
        raise self.error


def test_a_read_only_file_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("kept")
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everything
    with pytest.raises(NotWritable, match="Permission denied"):
        write(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept" and os.listdir(tmp_path) == ["file"]


def test_nothing_is_written_through_a_symlink_in_the_place_of_the_temporary_file(tmp_path):
    victim, target = tmp_path / "victim", tmp_path / "file"
    victim.write_text("kept")
    target.with_name(f".file.{os.getpid()}.partial").symlink_to(victim)
    write(target)
    assert (victim.read_text(), target.read_text()) == ("kept", "new") and not target.is_symlink()


def test_a_device_is_written_to_and_stays(tmp_path):
    null = tmp_path / "null"
    null.symlink_to("/dev/null")
    for target in (null, Path("/dev/null")):
        write(target)
        assert target.is_char_device()
    assert null.is_symlink() and not Path("/dev/.null.partial").exists()


def test_a_pipe_gets_the_contents_if_somebody_reads_it(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(NotWritable, match="cannot write .*pipe"):
        write(pipe)
    with open(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)) as reader:
        write(pipe, "content")
        assert reader.read() == "content" and pipe.is_fifo()


@pytest.mark.parametrize("link", ["/dev/stdout", "out"])
@pytest.mark.parametrize("to_file", [True, False], ids=["to a file", "to a pipe"])
def test_this_process_s_own_output_is_added_to(link, to_file, tmp_path):
    code = f"""
from pathlib import Path
from molf.files import atomic_write
print("before")
with atomic_write(Path({link!r})) as partial:
    partial.write_text("content\\n")
print("after")
"""
    if not to_file and link == "out":
        (tmp_path / "out").symlink_to("/dev/fd/1")
    with (tmp_path / "out").open("w") if to_file else nullcontext(subprocess.PIPE) as stdout:
        done = subprocess.run([sys.executable, "-c", code], stdout=stdout, cwd=tmp_path, text=True, check=True)
    assert ((tmp_path / "out").read_text() if to_file else done.stdout) == "before\ncontent\nafter\n"


@dataclass(frozen=True)
class Leaf:
    number: float
    word: str | None = None


@dataclass(frozen=True)
class Tree:
    count: int
    leaves: dict[str, Leaf]
    extra: dict[str, Any]
    yes: bool = True
    one: Leaf | None = None


GOOD = {"count": 1, "leaves": {"a": {"number": 2}}, "extra": {"x": [None]}}


def test_the_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("MOLF_CACHE", raising=False)
    assert cache_folder() == Path("/home/someone/.cache/molf")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/xdg")
    assert cache_folder() == Path("/var/xdg/molf")
    monkeypatch.setenv("MOLF_CACHE", "~/mine")
    assert cache_folder() == Path("/home/someone/mine")


def test_values_get_their_types():
    tree = typed(Tree, GOOD | {"one": {"number": 1.5, "word": "w"}})
    assert tree == Tree(1, {"a": Leaf(2.0)}, {"x": [None]}, True, Leaf(1.5, "w"))
    assert isinstance(tree.leaves["a"].number, float)
    assert typed(Tree, GOOD | {"one": None}).one is None


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([], "the file must be an object, found a list"),
        (None, "the file must be an object, found null"),
        ({}, "no count, leaves, extra"),
        (GOOD | {"more": 1}, "unknown more"),
        (GOOD | {"count": "1"}, "count must be an integer, found a string"),
        (GOOD | {"count": True}, "count must be an integer, found true or false"),
        (GOOD | {"count": 1.0}, "count must be an integer, found a number"),
        (GOOD | {"yes": 1}, "yes must be true or false, found an integer"),
        (GOOD | {"leaves": []}, "leaves must be an object, found a list"),
        (GOOD | {"leaves": {"a": 3}}, r"leaves\['a'\] must be an object, found an integer"),
        (GOOD | {"leaves": {"a": {}}}, r"no number in leaves\['a'\]"),
        (GOOD | {"leaves": {"a": {"number": "2"}}}, r"leaves\['a'\].number must be a number, found a string"),
        (GOOD | {"one": {"number": None}}, "one.number must be a number, found null"),
    ],
)
def test_other_types_are_named(value, words):
    with pytest.raises(MolfError, match=f"^{words}$"):
        typed(Tree, value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff{}", "not JSON .*utf-8"),
        (b"[" * 10_000, "not JSON|lists and objects are nested"),
        (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "more than 100 lists and objects are nested"),
        (b"[" + b"9" * 5000 + b"]", "not JSON .*digits"),
        (b"[9223372036854775808]", "an integer of more than 64 bits"),
        (rb'{"a": "\ud800"}', r"half of a character, '\\ud800'"),
        (rb'{"\udcff": 1}', "half of a character"),
    ],
)
def test_what_no_file_should_hold_is_one_line(content, words, tmp_path):
    file = tmp_path / "x.json"
    file.write_bytes(content)
    with pytest.raises(MolfError, match=words) as raised:
        read_json(file)
    assert "\n" not in str(raised.value)


def test_a_good_file(tmp_path):
    file = tmp_path / "x.json"
    file.write_text(json.dumps(GOOD | {"extra": {"ü": [2**63 - 1, "\U0001f600", float("inf")]}}))
    assert read_json(file, Tree).extra == {"ü": [2**63 - 1, "\U0001f600", float("inf")]}
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none")
