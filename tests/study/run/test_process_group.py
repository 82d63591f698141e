import time
import weakref
from datetime import timedelta

import torch

from forked import on_two_ranks
from molf.study.run.process_group import all_wait, from_rank_0, leave_process_group, true_on_all_ranks


def test_without_a_group_there_is_nothing_to_wait_for_or_to_leave():
    with all_wait():
        leave_process_group()
    assert from_rank_0(lambda: 3) == 3 and true_on_all_ranks(True) and not true_on_all_ranks(False)
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


def test_ranks_agree_and_share_what_rank_0_makes(tmp_path):
    def rank_of_two(rank):
        return from_rank_0(lambda: f"made on {rank}"), true_on_all_ranks(rank == 0), true_on_all_ranks(True)

    assert on_two_ranks(rank_of_two, tmp_path) == [("made on 0", False, True)] * 2
