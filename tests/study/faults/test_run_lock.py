import errno
import fcntl
import logging
import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from fake_runs import working_in
from molf.errors import MolfError
from molf.study.config.run_config import RunConfig
from molf.study.faults.run_lock import in_use, lock_file, run_lock
from molf.study.run.train import run


@pytest.fixture
def work(tmp_path):
    """Start a process of a rank of a run."""
    with ExitStack() as stack:
        yield lambda rank=0: stack.enter_context(working_in(tmp_path / "run", rank))


def test_a_second_run_is_refused_until_the_first_is_gone(work, tmp_path):
    first = work()
    assert in_use(tmp_path / "run")
    config = RunConfig.from_dict({"output_dir": str(tmp_path / "run"), "overwrite": True})
    with pytest.raises(ValueError, match=r"another run is working in .*run; wait until it ends"):
        run(config)
    first.kill()
    first.wait()
    assert not in_use(tmp_path / "run")
    with run_lock(tmp_path / "run"):
        pass


def test_a_second_run_is_refused_by_any_name_of_the_folder(work, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    work()
    for name in (tmp_path / "link", tmp_path / "link" / ".." / "run"):
        with pytest.raises(ValueError, match="another run is working in"), run_lock(name):
            pass


def test_the_processes_of_a_run_work_together_and_each_keeps_others_out(work, tmp_path, monkeypatch):
    first, second = work(0), work(1)
    first.communicate("")
    assert in_use(tmp_path / "run"), "one is left"
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match="another run is working in"), run_lock(tmp_path / "run"):
        pass
    second.communicate("")
    assert not in_use(tmp_path / "run")


def test_a_folder_is_named_in_any_way(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    (tmp_path / "link").symlink_to("run")
    (tmp_path / "parent").symlink_to(tmp_path)
    for name in (".", "../run", tmp_path / "link", tmp_path / "parent" / "run", tmp_path / "new" / ".." / "run"):
        assert lock_file(Path(name)) == tmp_path / ".run.running"
    (tmp_path / "later").symlink_to("not yet")
    assert lock_file(tmp_path / "later") == tmp_path / ".not yet.running"
    assert not in_use(tmp_path / "run") and not list(tmp_path.glob(".*")), "asking leaves nothing"


def deny(monkeypatch, flags):
    """Make the file system refuse to open files with some of the flags: no mode keeps root out."""
    real = os.open

    def refuse(path, given, *more):
        if given & os.O_ACCMODE in flags:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, given, *more)

    monkeypatch.setattr(os, "open", refuse)


def test_a_reader_needs_no_right_to_write(work, tmp_path, monkeypatch):
    first = work()
    deny(monkeypatch, (os.O_RDWR, os.O_WRONLY))
    assert in_use(tmp_path / "run")
    first.communicate("")
    assert not in_use(tmp_path / "run")


def test_a_lock_that_cannot_be_read(tmp_path, monkeypatch):
    deny(monkeypatch, (os.O_RDONLY, os.O_RDWR))
    with pytest.raises(
        MolfError, match=r"whether a run works in .*run: .*.run.running: Permission denied; make it readable"
    ):
        in_use(tmp_path / "run")


def test_without_locks_a_run_goes_on_and_says_so(tmp_path, monkeypatch, caplog):
    def refuse(*given):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with caplog.at_level(logging.WARNING), run_lock(tmp_path / "run"):
        assert not in_use(tmp_path / "run")
    assert ".run.running (No locks available): nothing keeps a second run out" in caplog.text


def test_where_no_file_can_be_made_a_run_goes_on_and_says_so(tmp_path, caplog):
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING), run_lock(tmp_path / "file" / "run"):
        pass
    assert "nothing keeps a second run out of" in caplog.text
