"""The process group of a distributed run: waiting for rank 0, agreeing, and leaving together."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from torch import distributed

T = TypeVar("T")
_LONG = timedelta(days=30)


@contextmanager
def all_wait() -> Iterator[None]:
    """Hold every rank at the end of the block until all have reached it, without a timeout.

    The default group gives up after ``ddp_timeout``, half an hour. Rank 0 may save or evaluate for longer, so the others wait in
    a gloo group of its own, which also needs no device.
    """
    if not distributed.is_initialized():
        yield
        return
    group = distributed.new_group(backend="gloo", timeout=_LONG)
    yield  # after an error here, the launcher ends the ranks that wait
    distributed.barrier(group)
    distributed.destroy_process_group(group)


def true_on_all_ranks(flag: bool) -> bool:
    """Return whether a flag is true on every rank; all must make this call."""
    if not distributed.is_initialized():
        return flag
    flags: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(flags, flag)
    return all(flags)


def from_rank_0(make: Callable[[], T]) -> T:
    """Call a function on rank 0 and return its result on every rank."""
    if not distributed.is_initialized():
        return make()
    made: list[Any] = [make() if distributed.get_rank() == 0 else None]
    distributed.broadcast_object_list(made)
    result: T = made[0]
    return result


def leave_process_group() -> None:
    """Destroy the process group, as all ranks do after their common work, so that no timeout limits what rank 0 does alone.

    A process that exits with the group's threads still running may abort. The trainer must be gone by now: a model wrapper that
    outlives the group waits for its threads while it holds Python's lock, which they may need. Skip this after an error: it would
    deadlock with ranks that are still waiting here.
    """
    if distributed.is_initialized():
        gc.collect()
        distributed.destroy_process_group()
