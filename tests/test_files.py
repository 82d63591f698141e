import os

import pytest

from molf.errors import MolfError
from molf.files import atomic_folder, atomic_write


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
