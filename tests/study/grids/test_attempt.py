import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fake_runs import fake_run, working_in
from molf.integrations.checkpoint_folder import UNFINISHED, seal
from molf.study.faults.preemption import PREEMPTED
from molf.study.faults.run_lock import in_use
from molf.study.grids.attempt import Attempt, failure_status, has_checkpoint

TESTS = Path(__file__).parents[2]


def until(condition):
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("still not true after a minute")


def in_thread(attempt):
    """Start an attempt and return what waits for it and gives its status."""
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(attempt()))
    thread.start()

    def ended():
        thread.join(60)
        return statuses[0]

    return ended


@pytest.mark.parametrize("keep", [False, True])
def test_a_run_that_finishes(keep, tmp_path):
    cell = fake_run(tmp_path, "finish")
    assert Attempt(cell, keep)() == 0
    assert cell.finished and failure_status(cell) is None
    assert (cell.folder / "model.safetensors").exists() == keep
    assert Attempt(cell)() == 0 and len(cell.starts()) == 1


def test_a_run_that_fails_leaves_a_note(tmp_path):
    cell = fake_run(tmp_path, "fail")
    assert Attempt(cell)() == failure_status(cell) == 3
    assert cell.log.read_text().splitlines()[-1] == "out of cheese"


def test_a_run_that_crashes_leaves_a_note(tmp_path):
    cell = fake_run(tmp_path, "crash")
    assert Attempt(cell)() == failure_status(cell) == 128 + signal.SIGABRT


def test_a_killed_run_leaves_no_note_and_goes_on_from_its_checkpoint(tmp_path):
    cell = fake_run(tmp_path, "kill")
    assert Attempt(cell)() == -signal.SIGKILL
    assert failure_status(cell) is None and has_checkpoint(cell) and not cell.finished
    assert Attempt(cell)() == 0 and cell.finished
    assert cell.resumed() == [False, True]
    assert cell.log.read_text().split() == ["started", "started", "again"]


def test_a_checkpoint_that_is_not_in_place_yet_is_gone_on_from(tmp_path):
    cell = fake_run(tmp_path, "finish")
    left = cell.folder / UNFINISHED / "checkpoint-3"
    left.mkdir(parents=True)
    assert not has_checkpoint(cell), "it is not whole"
    seal(left)
    assert has_checkpoint(cell)
    assert Attempt(cell)() == 0 and cell.resumed() == [True]


def test_a_stopped_run_saves_and_goes_on_later(tmp_path):
    cell = fake_run(tmp_path, "hold")
    attempt = Attempt(cell, own_session=True)
    ended = in_thread(attempt)
    until(cell.starts)
    attempt.stop()
    assert ended() == PREEMPTED
    assert has_checkpoint(cell) and failure_status(cell) is None
    assert Attempt(cell)() == 0 and cell.resumed() == [False, True]


def test_what_was_stopped_before_it_began_does_not_begin(tmp_path):
    cell = fake_run(tmp_path, "finish")
    attempt = Attempt(cell)
    attempt.stop()
    assert attempt() == PREEMPTED and not cell.starts()


def test_one_cell_never_runs_twice_at_once(tmp_path):
    cell = fake_run(tmp_path, "pause")
    first, second = in_thread(Attempt(cell)), in_thread(Attempt(cell))
    assert (first(), second(), len(cell.starts())) == (0, 0, 1)


def test_without_locks_it_runs_and_says_so(tmp_path, monkeypatch, caplog):
    def refuse(*given):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert Attempt(fake_run(tmp_path, "finish"))() == 0
    assert "finish.lock cannot be locked (No locks available): nothing keeps a second run out" in caplog.text


def test_one_that_waits_can_be_stopped(tmp_path):
    cell = fake_run(tmp_path, "hold")
    running, waiting = Attempt(cell), Attempt(cell)
    first = in_thread(running)
    until(cell.starts)
    second = in_thread(waiting)
    waiting.stop()
    assert second() == PREEMPTED
    running.stop()
    assert first() == PREEMPTED and len(cell.starts()) == 1


def test_a_run_whose_starter_was_killed_is_not_started_again_beside_itself(tmp_path):
    code = (
        "from pathlib import Path; from fake_runs import fake_run; from molf.study.grids.attempt import Attempt\n"
        f"Attempt(fake_run(Path({str(tmp_path)!r}), 'pause'), own_session=True)()"
    )
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    starter = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path})
    cell = fake_run(tmp_path, "pause")
    until(cell.starts)
    starter.kill()
    starter.wait()
    assert not cell.finished
    assert Attempt(cell)() == 0
    assert cell.finished and len(cell.starts()) == 1


def test_a_run_waits_for_every_process_of_an_earlier_one(tmp_path, monkeypatch):
    """Those that a launcher started may outlive it."""
    cell, looks = fake_run(tmp_path, "finish"), []
    monkeypatch.setattr("molf.study.grids.attempt.in_use", lambda folder: looks.append(in_use(folder)) or looks[-1])
    with working_in(cell.folder, rank=1) as left:
        ended = in_thread(Attempt(cell))
        until(lambda: looks)
        assert looks[0] and not cell.starts()
        left.communicate("")
    assert ended() == 0 and not looks[-1] and len(cell.starts()) == 1


def test_a_job_that_is_requeued_takes_an_attempt_without_its_process(tmp_path):
    cell = fake_run(tmp_path, "hold")
    attempt = Attempt(cell, keep_model=True)
    ended = in_thread(attempt)
    until(cell.starts)
    later = attempt.checkpoint()
    assert has_checkpoint(cell) and ended() == PREEMPTED
    assert later.function == Attempt(cell, keep_model=True) and later.function._process is None
    assert later.result() == 0 and cell.resumed() == [False, True]


def test_a_run_that_the_scheduler_stops_asks_to_be_requeued(tmp_path):
    cell, asked = fake_run(tmp_path, "hold"), []
    attempt = Attempt(cell, grace=0, requeue_signal=signal.SIGUSR1)
    before = signal.signal(signal.SIGUSR1, lambda number, frame: asked.append(number))
    try:
        ended = in_thread(attempt)
        until(cell.starts)
        attempt._process.terminate()
        assert ended() == PREEMPTED
        until(lambda: asked)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert asked == [signal.SIGUSR1] and has_checkpoint(cell)


def test_the_environment_of_a_run(tmp_path):
    cell = fake_run(tmp_path, "finish")
    attempt = Attempt(cell, environment={"PYTHONHOME": "/no/such/place"})
    assert attempt() != 0
    assert "/no/such/place" in cell.log.read_text()
