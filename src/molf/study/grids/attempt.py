"""One attempt at a run, in whatever process an engine makes for it. Nothing here imports torch."""

import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import IO, TYPE_CHECKING

from molf.files import atomic_write, write_errors
from molf.study.faults.preemption import PREEMPTED, exit_status
from molf.study.faults.run_lock import in_use
from molf.study.grids.spec import FAILED, RunSpec

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

_log = logging.getLogger(__name__)

LOCK = ".lock"
_SHARD = "[0-9]" * 5
# Only the names that a run gives; other weights in its folder are the user's.
_TRAINED = (
    "model.safetensors",
    f"model-{_SHARD}-of-{_SHARD}.safetensors",
    "adapters/*/adapter_model.safetensors",
)
_PAUSE = 0.5  # seconds between two looks at a lock or a process

_TIED = """
import ctypes, os, sys
getattr(ctypes.CDLL(None), "prctl", lambda *_: None)(1, 15)
os.execv(sys.argv[1], sys.argv[1:])
"""
"""Becomes the command in its arguments, with PR_SET_PDEATHSIG: Linux sends it SIGTERM when the process that started it dies."""


@dataclass
class Attempt:
    """Runs a command until it ends; the command itself resumes from what an earlier attempt left.

    A second attempt at the same time waits for the first one, and for the processes of an attempt that was killed. If the run
    fails or crashes, ``NAME.failed.json`` says so; if it is killed or stopped, it is simply not finished.

    Attributes:
        spec: The run; its settings file is written.
        keep_model: Keep the trained weights.
        grace: Seconds that a stopped run gets to save.
        requeue_signal: Signal that makes submitit requeue the job; None without a scheduler.
        environment: Environment variables to add.
    """

    spec: RunSpec
    keep_model: bool = False
    grace: float = 60.0
    requeue_signal: signal.Signals | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)
    _stopped: bool = field(default=False, init=False, repr=False)

    def __call__(self) -> int:
        """Run the command unless the run is finished; return the exit status, negative if it was killed."""
        with self._turn() as lock:
            if self._stopped or lock is None:
                return PREEMPTED
            if self.spec.state == "finished":
                return 0
            status = self._run(lock)
            if status == PREEMPTED and not self._stopped:
                self._requeue()
            if status == 0 and not self.keep_model:
                for weights in chain.from_iterable(map(self.spec.folder.glob, _TRAINED)):
                    weights.unlink()
            elif status > 0 and status != PREEMPTED:
                with atomic_write(self.spec.beside(FAILED)) as partial:
                    failed = {"status": status, "host": socket.gethostname()}
                    partial.write_text(json.dumps(failed) + "\n", encoding="utf-8")
            return status

    def stop(self) -> None:
        """Tell the run to save and end."""
        self._stopped = True
        if self._process is not None:
            self._process.terminate()

    def checkpoint(self) -> "DelayedSubmission":
        """Stop the run and return the attempt that resumes it; submitit calls this before it requeues a job."""
        from submitit.helpers import DelayedSubmission

        self.stop()
        if self._process is not None:
            _wait_for_end(self._process.pid, self.grace)
        return DelayedSubmission(replace(self))

    @contextmanager
    def _turn(self) -> Iterator[int | None]:
        """Wait until no other attempt is running; yield the lock's file descriptor, or None if stopped while waiting.

        Processes started by torchrun do not inherit this lock and may outlive it, so wait for the run's own lock as well.
        """
        with write_errors(self.spec.beside(LOCK)):
            lock = self.spec.beside(LOCK).open("a")
        with lock as file:
            waits = False
            while not _lock(file) or in_use(self.spec.folder):
                if self._stopped:
                    yield None
                    return
                if not waits:
                    _log.warning("another attempt at %s has not ended yet; waiting for it", self.spec.folder)
                waits = True
                time.sleep(_PAUSE)
            yield file.fileno()

    def _run(self, lock: int) -> int:
        with self.spec.log_file.open("ab") as output:
            # The run inherits the lock: if this process is killed, the next attempt waits until the run has saved and ended.
            self._process = subprocess.Popen(
                [sys.executable, "-c", _TIED, *self.spec.command],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **self.environment},
                pass_fds=[lock],
                start_new_session=True,  # a Ctrl-C in this terminal is not for the run: `stop` stops it
            )
        if self._stopped:
            self._process.terminate()
        return exit_status(self._process.wait())

    def _requeue(self) -> None:
        """Requeue the job, unless whoever stopped the run ends the job within the grace period.

        A scheduler that makes room for another job sends SIGTERM and requeues this one when it kills it. A user who cancels the
        job also sends SIGTERM, and does not want it back.
        """
        if self.requeue_signal is not None:
            time.sleep(self.grace)
            signal.raise_signal(self.requeue_signal)


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        _log.warning("cannot lock %s (%s): nothing keeps a second run out", file.name, error.strerror)
    return True


def _wait_for_end(pid: int, seconds: float) -> None:
    """Wait until a child has ended, and leave its status for ``Popen.wait``.

    This runs in a signal handler that may have interrupted ``Popen.wait``. Calling that here would wait for its own lock.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None:
                return
        except ChildProcessError:  # Popen.wait was faster
            return
        time.sleep(_PAUSE)
