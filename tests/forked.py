"""Two ranks of a gloo group, forked from the tests, which therefore start at once and need nothing pickled."""

import warnings
from datetime import timedelta
from multiprocessing import get_context

import torch


def on_two_ranks(function, folder, timeout=timedelta(seconds=60)):
    """Call a function on each of two ranks and return what both return.

    Args:
        function: Takes the rank; what it returns goes through a queue. It may leave the group.
        folder: Where the ranks find each other.
        timeout: How long the group waits.
    """
    context = get_context("fork")
    queue = context.Queue()
    given = (function, folder / "store", timeout, queue)
    ranks = [context.Process(target=_be_rank, args=(rank, *given)) for rank in range(2)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)
        for process in ranks:
            process.start()
    results = dict(queue.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]
    return [results[0], results[1]]


def _be_rank(rank, function, store, timeout, queue):
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2, timeout=timeout)
    queue.put((rank, function(rank)))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
