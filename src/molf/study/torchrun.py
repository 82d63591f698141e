"""``torchrun`` with the exit status of its processes: ``python -m molf.study.torchrun`` takes the arguments of ``torchrun``.

torchrun itself always fails with status 1, so a run that was stopped and saved looks like one that crashed.
"""

import os
import signal
import sys
from collections.abc import Collection, Sequence

from molf.study.faults.preemption import PREEMPTED, exit_status

SAVING = 600
"""Seconds that the processes get to save a checkpoint after a stop signal; torchrun's default is 30."""


def main(argv: Sequence[str] | None = None) -> int:
    """Start the processes, wait for them and return their exit status.

    It is the status of a process that failed (128 + n for one that crashed with signal n), or 75 if all were stopped. If one was
    killed, this process kills itself too.
    """
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVING))
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # torchrun forwards SIGTERM to its processes, but would die of SIGUSR1.
    signal.signal(signal.SIGUSR1, lambda number, frame: signal.raise_signal(signal.SIGTERM))
    try:
        run.run(run.parse_args(argv))  # type: ignore[no-untyped-call]  # torch does not type it
    except SignalException:
        return PREEMPTED
    except ChildFailedError as error:
        status = _status([failure.exitcode for failure in error.failures.values()])
        if status < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return status
    return 0


def _status(codes: Collection[int]) -> int:
    """Return the status of a group of processes: when one fails, torchrun stops the others."""
    statuses = [exit_status(code) for code in codes]
    if -signal.SIGKILL in statuses:
        return -signal.SIGKILL
    return max((status for status in statuses if status > 0 and status != PREEMPTED), default=PREEMPTED)


if __name__ == "__main__":
    sys.exit(main())
