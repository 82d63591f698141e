"""torchrun whose exit status says how the processes ended: ``python -m molf.study.torchrun`` takes the arguments of ``torchrun``.

torchrun itself ends with 1 whatever happened, so that a run that was stopped and saved looks like one that failed.
"""

import os
import signal
import sys
from collections.abc import Collection, Sequence

from molf.study.faults.preemption import PREEMPTED, exit_status

SAVING = 600
"""How many seconds the processes get to save when this one is told to stop; torchrun's own limit is 30."""


def main(argv: Sequence[str] | None = None) -> int:
    """Start the processes, wait for them and return their status.

    It is that of a process that failed, 128 + n where it crashed with signal n, and 75 where all were told to stop. Where one was
    killed, this process is too.

    Args:
        argv: The arguments of ``torchrun``; those of this process if left out.
    """
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVING))
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # torchrun passes SIGTERM on to its processes, and would die of this one.
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
    """Return what processes that did not succeed come to; when one fails, torchrun tells the others to stop."""
    statuses = [exit_status(code) for code in codes]
    if -signal.SIGKILL in statuses:
        return -signal.SIGKILL
    return max((status for status in statuses if status > 0 and status != PREEMPTED), default=PREEMPTED)


if __name__ == "__main__":
    sys.exit(main())
