import time
import weakref
from datetime import timedelta
from multiprocessing import get_context

import pytest
import torch

from molf.study.process_group import all_wait, leave_process_group


def test_without_a_group_there_is_nothing_to_wait_for_or_to_leave():
    with all_wait():
        leave_process_group()
    assert not torch.distributed.is_initialized()


def test_the_trainer_is_gone_before_the_group_is_left(monkeypatch):
    """A model's wrapper that outlives the group may wait for ever for the group's threads."""
    trainer = torch.nn.Module()
    trainer.state = {"trainer": trainer}
    held, left = weakref.ref(trainer), []
    del trainer
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: left.append(held()))
    leave_process_group()
    assert left == [None]


def _rank(rank, file, queue):
    """The first of two ranks works for longer than their group waits."""
    short = timedelta(seconds=0.5)
    torch.distributed.init_process_group("gloo", f"file://{file}", rank=rank, world_size=2, timeout=short)
    with all_wait():
        if rank == 0:
            time.sleep(2)
            file.with_name("done").touch()
    queue.put(file.with_name("done").exists())
    leave_process_group()
    queue.put(torch.distributed.is_initialized())


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_the_others_wait_for_as_long_as_the_first_works(tmp_path):
    context = get_context("fork")
    queue = context.Queue()
    ranks = [context.Process(target=_rank, args=(rank, tmp_path / "store", queue)) for rank in range(2)]
    for process in ranks:
        process.start()
    told = [queue.get(timeout=60) for _ in range(4)]
    for process in ranks:
        process.join()
    assert sorted(told) == [False, False, True, True]
    assert [process.exitcode for process in ranks] == [0, 0]
