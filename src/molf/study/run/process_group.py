"""The process group of a distributed run: waiting for the first rank's work, and leaving together."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from torch import distributed

_LONG = timedelta(days=30)


@contextmanager
def all_wait() -> Iterator[None]:
    """Let no rank out of the block before all have come to its end, however long that takes.

    The group of a run gives up after ``ddp_timeout``, half an hour, as something hangs then. A first rank that evaluates or
    saves may take longer, so the others wait in a group of its own, which needs no device.
    """
    if not _joined():
        yield
        return
    group = distributed.new_group(backend="gloo", timeout=_LONG)
    yield  # left with an error, others that wait end with their launcher
    distributed.barrier(group)
    distributed.destroy_process_group(group)


def leave_process_group() -> None:
    """Leave the group, as all ranks do after what they did together: what the first one does alone has no limit then.

    A process that ends with the group's threads still running may abort. The trainer must be gone by now, and with it the last
    wrapper of a model: one that outlives the group waits for its threads while it holds Python's lock, which they may be waiting
    for. After an error the group is not left: that waits for ranks that wait for this one.
    """
    if _joined():
        gc.collect()
        distributed.destroy_process_group()


def _joined() -> bool:
    return distributed.is_available() and distributed.is_initialized()
