"""Preemption: a run that gets SIGTERM or SIGUSR1 saves a checkpoint and asks by its exit status to be started again.

Nothing here imports torch, so that programs which start runs can import ``PREEMPTED`` at no cost.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PREEMPTED = 75
"""Exit status of a run that was stopped by a signal and should be started again: ``EX_TEMPFAIL`` of ``sysexits.h``."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What a scheduler sends before it kills: SIGTERM, or SIGUSR1 with SLURM's ``--signal=USR1@60``."""


def exit_status(code: int) -> int:
    """Return the exit status of a process, negative only if it was killed or stopped from outside, which is not its fault.

    A process that died of another signal n (SIGSEGV, a watchdog's SIGABRT) crashed; its status is 128 + n, as in a shell.

    Args:
        code: The ``returncode`` of ``subprocess``, -n for signal n.
    """
    return 128 - code if code < 0 and -code not in (signal.SIGKILL, *STOP_SIGNALS) else code


class Preempted(SystemExit):
    """A run was stopped by a signal. Uncaught, it ends the process with status ``PREEMPTED``."""

    def __init__(self, message: str):
        super().__init__(PREEMPTED)
        self.message = message


class StopRequest:
    """Whether this process was asked to stop.

    Attributes:
        received: Name of the signal, or None.
        deferred: While True, a signal is only recorded, and whoever set this ends the run at a good moment. Otherwise a signal
            raises ``Preempted`` at once, because there is nothing to save.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.deferred = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        self.received = signal.Signals(number).name
        if not self.deferred:
            raise Preempted(
                f"stopped by {self.received} outside training, with nothing to save; start it again with "
                "--resume_from_checkpoint True to keep what it has trained"
            )


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Handle ``STOP_SIGNALS`` inside the block; the previous handlers are restored at the end.

    Only the main thread gets signals: in any other, nothing is ever received.
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
