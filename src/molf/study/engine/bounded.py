"""Bounds for programs of others that run in this process, which chat templates are."""

import math
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS = 10.0
"""Most CPU time of a call, which usually takes milliseconds."""
BYTES = 2**31
"""Most memory that a call may allocate."""
_KILL_AFTER = (
    60  # seconds of CPU time in one operation that Python cannot interrupt, such as a product of huge integers
)


@contextmanager
def bounded() -> Iterator[None]:
    """Bound the CPU time and the memory of a block.

    Raises:
        TimeoutError: The block takes too long; in the main thread only, where Python handles signals.
        MemoryError: It needs too much memory; on Linux only.
    """
    with (
        _limit(resource.RLIMIT_AS, _address_space(), BYTES),
        _limit(resource.RLIMIT_CPU, math.ceil(time.process_time()), _KILL_AFTER),
        _timer(),
    ):
        yield


def _address_space() -> int | None:
    """Return the bytes of this process's address space, or None where they cannot be read."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else None


@contextmanager
def _limit(number: int, used: int | None, more: int) -> Iterator[None]:
    """Lower a limit of this process to what it uses now and some more, for a block."""
    soft, hard = resource.getrlimit(number)
    if used is None or (soft != resource.RLIM_INFINITY and soft < used + more):
        yield
        return
    resource.setrlimit(number, (used + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(number, (soft, hard))


@contextmanager
def _timer() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"it takes more than {SECONDS:g} seconds")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
