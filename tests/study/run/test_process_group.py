import time
import weakref
from datetime import timedelta

import torch

from forked import on_two_ranks
from molf.study.run.process_group import all_wait, leave_process_group


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


def test_the_others_wait_for_as_long_as_the_first_works(tmp_path):
    """Which is longer than their group waits."""

    def rank_of_two(rank):
        with all_wait():
            if rank == 0:
                time.sleep(2)
                (tmp_path / "done").touch()
        done = (tmp_path / "done").exists()
        leave_process_group()
        return done, torch.distributed.is_initialized()

    assert on_two_ranks(rank_of_two, tmp_path, timedelta(seconds=0.5)) == [(True, False), (True, False)]
