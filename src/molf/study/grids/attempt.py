"""One try at a cell, in whatever process an engine makes for it. Nothing here imports torch."""

import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import IO, TYPE_CHECKING

from molf.files import atomic_write
from molf.integrations.checkpoint_folder import MANIFEST, PREFIX, UNFINISHED, checkpoints
from molf.study.faults.preemption import PREEMPTED, exit_status
from molf.study.faults.run_lock import in_use
from molf.study.grids.spec import RunSpec, remove_weights

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

_log = logging.getLogger(__name__)

FAILED, LOCK = ".failed.json", ".lock"
_PAUSE = 0.5  # seconds between two looks at a lock or a process


@dataclass
class Attempt:
    """A run of a cell's command that goes on where an earlier attempt left a checkpoint.

    A second attempt at the same time waits for the first, and for every process of a run whose starter is gone. A run that fails
    or crashes leaves ``NAME.failed.json``; one that was killed or stopped leaves nothing, and is simply not finished.

    Attributes:
        cell: The cell, with its settings written.
        keep_model: Keep the trained weights.
        own_session: Shield the run from a Ctrl-C in this terminal, so that it is stopped by ``stop`` alone.
        grace: How many seconds a stopped run gets to save what it has.
        requeue_signal: What asks the scheduler's side of this process to requeue the job; None without a scheduler.
        environment: Variables to add to the run's environment.
    """

    cell: RunSpec
    keep_model: bool = False
    own_session: bool = False
    grace: float = 60.0
    requeue_signal: signal.Signals | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)
    _stopped: bool = field(default=False, init=False, repr=False)

    def __call__(self) -> int:
        """Run the cell unless it is finished by now; return its exit status, negative where it was killed."""
        with self._turn() as lock:
            if self._stopped or lock is None:
                return PREEMPTED
            if self.cell.finished:
                return 0
            status = self._run(lock)
            if status == PREEMPTED and not self._stopped:
                self._requeue()
            if status == 0 and not self.keep_model:
                remove_weights(self.cell)
            elif status > 0 and status != PREEMPTED:
                record_failure(self.cell, status)
            return status

    def stop(self) -> None:
        """Ask the run to save what it has and to end."""
        self._stopped = True
        if self._process is not None:
            self._process.terminate()

    def checkpoint(self) -> "DelayedSubmission":
        """Stop the run and return what goes on with it later: submitit calls this before it requeues a job."""
        from submitit.helpers import DelayedSubmission

        self.stop()
        if self._process is not None:
            _await_end(self._process.pid, self.grace)
        return DelayedSubmission(replace(self))

    @contextmanager
    def _turn(self) -> Iterator[int | None]:
        """Wait until nobody else runs this cell; yield the lock's descriptor, None if stopped while waiting.

        The processes that a launcher starts do not inherit the lock, and may outlive it: they have one of their own.
        """
        with self.cell.beside(LOCK).open("a") as file:
            while not _locked(file) or in_use(self.cell.folder):
                if self._stopped:
                    yield None
                    return
                time.sleep(_PAUSE)
            yield file.fileno()

    def _run(self, lock: int) -> int:
        going_on = has_checkpoint(self.cell)
        more = ["--resume_from_checkpoint", "True"] if going_on else []
        with self.cell.log.open("ab" if going_on else "wb") as log:
            # The run inherits the lock: even if this process is killed, nobody starts the cell again while the run goes on.
            self._process = subprocess.Popen(
                [*self.cell.command, *more],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **self.environment},
                pass_fds=[lock],
                start_new_session=self.own_session,
            )
        if self._stopped:
            self._process.terminate()
        return exit_status(self._process.wait())

    def _requeue(self) -> None:
        """Requeue the job of a run that was told to stop, unless whoever told it ends the job within the grace period.

        A scheduler that makes room sends SIGTERM and requeues the job itself when it kills it; a user who cancels the job sends
        SIGTERM too, and does not want it back.
        """
        if self.requeue_signal is not None:
            time.sleep(self.grace)
            signal.raise_signal(self.requeue_signal)


def has_checkpoint(cell: RunSpec) -> bool:
    """Say whether an earlier attempt left a checkpoint to go on from, be it one that is whole and not in place yet."""
    sealed = (cell.folder / UNFINISHED).glob(f"{PREFIX}*/{MANIFEST}")
    return bool(checkpoints(cell.folder)) or any(sealed)


def record_failure(cell: RunSpec, status: int) -> None:
    """Note that a cell failed, so that it is not tried again unasked."""
    with atomic_write(cell.beside(FAILED)) as partial:
        partial.write_text(json.dumps({"status": status, "host": socket.gethostname()}) + "\n", encoding="utf-8")


def failure_status(cell: RunSpec) -> int | None:
    """Return the exit status that a cell failed with; None where it did not."""
    try:
        return int(json.loads(cell.beside(FAILED).read_text(encoding="utf-8"))["status"])
    except FileNotFoundError:
        return None


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        _log.warning("%s cannot be locked (%s): nothing keeps a second run out", file.name, error.strerror)
    return True


def _await_end(pid: int, seconds: float) -> None:
    """Wait for a child to end and leave it to its own waiter.

    This runs in a signal handler, which may have interrupted ``Popen.wait``, whose lock ``Popen.wait`` here would wait for.
    """
    deadline = time.monotonic() + seconds
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(_PAUSE)


def _runs(pid: int) -> bool:
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None
    except ChildProcessError:  # its waiter was quicker
        return False
