import errno
import fcntl
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from molf.study.config import RunConfig
from molf.study.run_lock import holding, in_use, lock_file
from molf.study.train import run

# Works in a folder until its input ends.
WORKER = """
import sys
from pathlib import Path
from molf.study.run_lock import holding
with holding(Path(sys.argv[1])):
    print("works", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
    """Start a process of a rank of a run, and wait until it works."""
    processes = []

    def work(rank=0):
        monkeypatch.setenv("RANK", str(rank))
        command = [sys.executable, "-c", WORKER, str(tmp_path / "run")]
        processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert processes[-1].stdout.readline() == "works\n"
        monkeypatch.delenv("RANK")
        return processes[-1]

    yield work
    for process in processes:
        process.kill()
        process.communicate()


def test_a_second_run_is_refused_until_the_first_is_gone(work, tmp_path):
    first = work()
    assert in_use(tmp_path / "run")
    config = RunConfig.from_dict({"output_dir": str(tmp_path / "run"), "overwrite": True})
    with pytest.raises(ValueError, match=r"another run works in .*run and has not ended yet; wait for it"):
        run(config)
    first.kill()
    first.wait()
    assert not in_use(tmp_path / "run")
    with holding(tmp_path / "run"):
        pass


def test_the_processes_of_a_run_work_together_and_each_keeps_others_out(work, tmp_path, monkeypatch):
    first, second = work(0), work(1)
    first.communicate("")
    assert in_use(tmp_path / "run"), "one is left"
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match="another run works in"), holding(tmp_path / "run"):
        pass
    second.communicate("")
    assert not in_use(tmp_path / "run")


def test_a_folder_is_named_in_any_way(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    assert lock_file(Path(".")) == lock_file(tmp_path / "run") == tmp_path / ".run.running"
    assert not in_use(tmp_path / "run") and not list(tmp_path.glob(".*")), "asking leaves nothing"


def test_without_locks_a_run_goes_on_and_says_so(tmp_path, monkeypatch, caplog):
    def refuse(*given):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with caplog.at_level(logging.WARNING), holding(tmp_path / "run"):
        assert not in_use(tmp_path / "run")
    assert ".run.running cannot be locked (No locks available): nothing keeps a second run out" in caplog.text


def test_where_no_file_can_be_made_a_run_goes_on_and_says_so(tmp_path, caplog):
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING), holding(tmp_path / "file" / "run"):
        pass
    assert "nothing keeps a second run out of" in caplog.text
