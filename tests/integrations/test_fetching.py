import copy
from dataclasses import replace

import pytest
import torch

from molf.integrations.fetching import Fetch
from molf.integrations.routing_log import _MOST_PENDING
from routing_logs import routing, run_by_hand, steps


@pytest.fixture
def run(tmp_path):
    return run_by_hand(tmp_path)


class Slow:
    """Decisions that do not reach the host before they are waited for."""

    def __init__(self, monkeypatch):
        self.waited = 0
        monkeypatch.setattr(Fetch, "done", False)
        get = Fetch.get

        def waiting(fetch):
            self.waited += 1
            return get(fetch)

        monkeypatch.setattr(Fetch, "get", waiting)


@pytest.fixture
def slow(monkeypatch):
    return Slow(monkeypatch)


def test_no_step_waits_and_no_line_is_lost(run, slow):
    run.event("on_train_begin")
    for _ in range(5):
        run.step()
    assert steps(run.log) == [] and slow.waited == 0
    run.event("on_train_end")
    assert steps(run.log) == [1, 2, 3, 4, 5]
    run.optimizer.state_dict()
    assert steps(run.log) == [1, 2, 3, 4, 5]


def test_what_is_on_its_way_is_written_in_order_when_it_is_there(run, monkeypatch):
    monkeypatch.setattr(Fetch, "done", False)
    run.event("on_train_begin")
    run.step()
    run.step()
    monkeypatch.setattr(Fetch, "done", True)
    run.step()
    assert steps(run.log) == [1, 2, 3]


def test_no_more_than_a_few_decisions_are_kept(run, slow):
    run.event("on_train_begin")
    for _ in range(_MOST_PENDING + 3):
        run.step()
    assert steps(run.log) == [1, 2, 3]


def test_a_checkpoint_is_never_ahead_of_the_log(run, slow):
    """A Trainer tells callbacks of a checkpoint when it is there already, and may be killed in between."""
    run.event("on_train_begin")
    run.step()
    run.step()
    copy.deepcopy(run.optimizer.state_dict())
    assert steps(run.log) == [1, 2]
    run.step()
    run.state.global_step = 2  # killed, and resumed from that checkpoint
    run.event("on_train_begin")
    run.step()
    run.event("on_train_end")
    assert steps(run.log) == [1, 2, 3]


def test_logged_numbers_are_those_of_all_steps(run, slow):
    run.event("on_train_begin")
    shares = []
    for _ in range(2):
        run.step()
        shares.append(run.optimizer.routing.share("fft"))
    assert run.logged(loss=1.0)["molf/fft_share"] == pytest.approx(sum(shares) / 2)
    assert steps(run.log) == [1, 2]


def test_a_decision_on_the_host_is_there_at_once():
    decided = routing()
    fetch = Fetch(decided)
    assert fetch.done and fetch.get() == decided


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_decision_is_fetched_without_waiting():
    decided = routing()
    decided = replace(
        decided, scores=decided.scores.cuda(), chosen=decided.chosen.cuda(), taken=torch.tensor(True).cuda()
    )
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fetch = Fetch(decided)
        decided.scores.zero_()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = fetch.get()
    assert fetch.done and torch.equal(found.scores, routing().scores) and torch.equal(found.chosen, routing().chosen)
    assert found.scores.is_pinned() and found.taken
