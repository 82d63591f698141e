import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fake_runs import fake_run, until, working_in
from molf.errors import MolfError
from molf.integrations.checkpoint_folder import checkpoints
from molf.study.faults.preemption import PREEMPTED
from molf.study.faults.run_lock import in_use
from molf.study.grids.attempt import Attempt

TESTS = Path(__file__).parents[2]


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
    spec = fake_run(tmp_path, "finish")
    assert Attempt(spec, keep)() == 0
    assert spec.state == "finished" and spec.failure is None
    assert (spec.folder / "model.safetensors").exists() == keep
    assert Attempt(spec)() == 0 and len(spec.starts()) == 1


def test_only_the_weights_that_the_run_wrote_are_removed(tmp_path):
    spec = fake_run(tmp_path, "finish")
    names = (
        "adapters/lora_r2/adapter_model.safetensors",
        "mine/model.safetensors",
        "mine.safetensors",
        "model-mine.safetensors",
    )
    names += ("adapters/mine.safetensors", "model-1-of-2.safetensors", "model-00001-of-00002.safetensors")
    for name in names:
        (spec.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (spec.folder / name).touch()
    assert Attempt(spec)() == 0
    assert [(spec.folder / name).exists() for name in names] == [False, *[True] * 5, False]


def test_a_run_that_fails_leaves_a_note(tmp_path):
    spec = fake_run(tmp_path, "fail")
    assert Attempt(spec)() == spec.failure.status == 3
    assert spec.log_file.read_text().splitlines()[-1] == "out of cheese"


def test_a_run_that_crashes_leaves_a_note(tmp_path):
    spec = fake_run(tmp_path, "crash")
    assert Attempt(spec)() == spec.failure.status == 128 + signal.SIGABRT


def test_a_killed_run_leaves_no_note_and_resumes(tmp_path):
    spec = fake_run(tmp_path, "kill")
    assert Attempt(spec)() == -signal.SIGKILL
    assert spec.failure is None and checkpoints(spec.folder) and spec.state == "interrupted"
    assert Attempt(spec)() == 0 and spec.state == "finished"
    assert spec.starts() == [False, True]
    assert spec.log_file.read_text().split() == ["started", "started", "again"]


def test_a_stopped_run_saves_and_resumes(tmp_path):
    spec = fake_run(tmp_path, "hold")
    attempt = Attempt(spec)
    ended = in_thread(attempt)
    until(spec.starts)
    attempt.stop()
    assert ended() == PREEMPTED
    assert checkpoints(spec.folder) and spec.failure is None
    assert Attempt(spec)() == 0 and spec.starts() == [False, True]


def test_what_was_stopped_before_it_began_does_not_begin(tmp_path):
    spec = fake_run(tmp_path, "finish")
    attempt = Attempt(spec)
    attempt.stop()
    assert attempt() == PREEMPTED and not spec.starts()


def test_one_run_never_runs_twice_at_once(tmp_path):
    spec = fake_run(tmp_path, "pause")
    first, second = in_thread(Attempt(spec)), in_thread(Attempt(spec))
    assert (first(), second(), len(spec.starts())) == (0, 0, 1)


def test_without_locks_it_runs_and_says_so(tmp_path, monkeypatch, caplog):
    def refuse(*given):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert Attempt(fake_run(tmp_path, "finish"))() == 0
    assert "finish.lock (No locks available): nothing keeps a second run out" in caplog.text


def test_a_lock_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "finish.lock").mkdir()
    with pytest.raises(MolfError, match="cannot write .*finish.lock: Is a directory; choose another path"):
        Attempt(fake_run(tmp_path, "finish"))()


def test_one_that_waits_says_so_and_can_be_stopped(tmp_path, caplog):
    spec = fake_run(tmp_path, "hold")
    running, waiting = Attempt(spec), Attempt(spec)
    first = in_thread(running)
    until(spec.starts)
    second = in_thread(waiting)
    until(lambda: f"another attempt at {spec.folder} has not ended yet; waiting for it" in caplog.text)
    waiting.stop()
    assert second() == PREEMPTED
    running.stop()
    assert first() == PREEMPTED and len(spec.starts()) == 1


def test_a_run_ends_with_its_starter_and_the_next_attempt_waits_until_it_has_saved(tmp_path):
    code = (
        "from pathlib import Path; from fake_runs import fake_run; from molf.study.grids.attempt import Attempt\n"
        f"Attempt(fake_run(Path({str(tmp_path)!r}), 'pause'))()"
    )
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    starter = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path})
    spec = fake_run(tmp_path, "pause")
    until(spec.starts)
    starter.kill()
    starter.wait()
    assert Attempt(spec)() == 0
    assert spec.state == "finished" and spec.starts() == [False, True]


def test_a_run_waits_for_every_process_of_an_earlier_one(tmp_path, monkeypatch):
    """Those that a launcher started may outlive it."""
    spec, looks = fake_run(tmp_path, "finish"), []
    monkeypatch.setattr("molf.study.grids.attempt.in_use", lambda folder: looks.append(in_use(folder)) or looks[-1])
    with working_in(spec.folder, rank=1) as left:
        ended = in_thread(Attempt(spec))
        until(lambda: looks)
        assert looks[0] and not spec.starts()
        left.communicate("")
    assert ended() == 0 and not looks[-1] and len(spec.starts()) == 1


def test_a_job_that_is_requeued_takes_an_attempt_without_its_process(tmp_path):
    spec = fake_run(tmp_path, "hold")
    attempt = Attempt(spec, keep_model=True)
    ended = in_thread(attempt)
    until(spec.starts)
    later = attempt.checkpoint()
    assert checkpoints(spec.folder) and ended() == PREEMPTED
    assert later.function == Attempt(spec, keep_model=True) and later.function._process is None
    assert later.result() == 0 and spec.starts() == [False, True]


def test_a_run_that_the_scheduler_stops_asks_to_be_requeued(tmp_path):
    spec, asked = fake_run(tmp_path, "hold"), []
    attempt = Attempt(spec, grace=0, requeue_signal=signal.SIGUSR1)
    before = signal.signal(signal.SIGUSR1, lambda number, frame: asked.append(number))
    try:
        ended = in_thread(attempt)
        until(spec.starts)
        attempt._process.terminate()
        assert ended() == PREEMPTED
        until(lambda: asked)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert asked == [signal.SIGUSR1] and checkpoints(spec.folder)
