from contextlib import redirect_stderr, redirect_stdout

import pytest

from molf.cli import main
from molf.study.grids.attempt import Attempt


@pytest.fixture
def model_folder(tiny_checkpoint, tmp_path, monkeypatch) -> str:
    """The folder of a tiny model; the current folder is an empty one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOG_FILE", raising=False)
    return tiny_checkpoint


@pytest.fixture
def in_process(monkeypatch):
    """Let the runs of a grid be carried out in this process, which has imported the libraries."""

    def run(attempt, lock):
        with attempt.spec.log_file.open("a") as log, redirect_stdout(log), redirect_stderr(log):
            return main(attempt.spec.command[3:])

    monkeypatch.setattr(Attempt, "_run", run)
