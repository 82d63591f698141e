"""Being told to stop: a run that gets SIGTERM or SIGUSR1 saves what it has and says by its exit status to start it again.

Nothing here imports torch, so that whatever starts runs can ask for ``PREEMPTED`` at no cost.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PREEMPTED = 75
"""Exit status of a run that was stopped from outside and is to be started again: ``EX_TEMPFAIL`` of ``sysexits.h``."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What a scheduler sends before it kills: SIGTERM, and SIGUSR1 where SLURM's ``--signal=USR1@60`` announces the end."""


def exit_status(code: int) -> int:
    """Return the status of a process: negative only where something outside ended it, which says nothing against the run.

    A process that died of another signal (SIGSEGV, a watchdog's SIGABRT) crashed; its status is 128 + n, as a shell gives it.

    Args:
        code: As ``subprocess`` gives it, -n for signal n.
    """
    return 128 - code if code < 0 and -code not in (signal.SIGKILL, *STOP_SIGNALS) else code


class Preempted(SystemExit):
    """A run was stopped from outside. Left alone, it ends the process with status ``PREEMPTED``."""

    def __init__(self, message: str):
        super().__init__(PREEMPTED)
        self.message = message


class StopRequest:
    """Whether this process was asked to stop.

    Attributes:
        received: Name of the signal, or None.
        deferred: While True, a signal is only noted: whoever set it ends the run at a good moment. Otherwise it ends the run
            at once with ``Preempted``, since there is nothing to save.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.deferred = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Take a signal (a handler of the ``signal`` module)."""
        self.received = signal.Signals(number).name
        if not self.deferred:
            raise Preempted(
                f"stopped by {self.received} outside training, with nothing left to save; start it again, with "
                "--resume_from_checkpoint True to keep what it has trained"
            )


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Listen for ``STOP_SIGNALS``; the handlers that were there come back at the end.

    Outside the main thread, which alone gets signals, nothing is ever received.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.handle) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
