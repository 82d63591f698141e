import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl

from forked import on_two_ranks
from molf.integrations.checkpoint_folder import checkpoints
from molf.integrations.routing_lines import LOG_FILES
from molf.study.faults.preemption import Preempted, StopRequest
from molf.study.faults.stop_at_step import StopAtStep
from small_runs import SignalAt, carry_out, weights

ROUTING_LOG = LOG_FILES["compact"]


@pytest.mark.parametrize(("number", "strategy"), [(signal.SIGTERM, "epoch"), (signal.SIGUSR1, "no")])
def test_a_stopped_run_goes_on_where_it_was(number, strategy, finished, settings, callbacks):
    """Signalled in the second of four steps, which is also the last of an epoch."""
    folder, whole = Path(settings["output_dir"]), weights(finished(method="molf").folder)
    callbacks.append(SignalAt(1, number))
    with pytest.raises(Preempted, match="75") as stopped:
        carry_out(settings, save_strategy=strategy)
    assert f"stopped by {number.name} after step 2 of 4" in stopped.value.message
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2"]
    assert not (folder / "result.json").exists()
    callbacks.clear()
    assert carry_out(settings, save_strategy=strategy, resume_from_checkpoint=True).training.steps == 4
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(folder).items())


def test_stopped_in_the_last_step_nothing_is_trained_again(settings, callbacks):
    """Where that step is in the middle of an epoch, the Trainer alone would take a fifth."""
    changes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 5}
    carry_out(settings, **changes)
    folder = Path(settings["output_dir"])
    whole, log = weights(folder), (folder / ROUTING_LOG).read_text()
    callbacks.append(SignalAt(4, signal.SIGTERM))
    with pytest.raises(Preempted, match="75"):
        carry_out(settings, **changes, overwrite=True)
    callbacks.clear()
    assert carry_out(settings, **changes, resume_from_checkpoint=True).training.steps == 5
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(folder).items())
    assert (folder / ROUTING_LOG).read_text() == log


def test_without_a_signal_nothing_changes():
    control = TrainerControl()
    StopAtStep(StopRequest()).on_step_end(SimpleNamespace(world_size=1), None, control)
    assert not control.should_save and not control.should_training_stop


@pytest.mark.parametrize(("launched", "stops"), [(True, True), (False, False)], ids=["by torchrun", "by hand"])
def test_who_is_gone_without_whom_a_rank_stops(launched, stops, tmp_path, monkeypatch):
    """Ranks that were started by hand outlive the shell that started them."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if launched:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a run")
    request, control = StopRequest(), TrainerControl()
    callback, args = StopAtStep(request), SimpleNamespace(world_size=2)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        callback.on_step_end(args, None, control)
        assert not control.should_training_stop
        monkeypatch.setattr(os, "getppid", lambda: 1)
        callback.on_step_end(args, None, control)
    finally:
        torch.distributed.destroy_process_group()
    assert control.should_save == control.should_training_stop == stops


def test_all_ranks_stop_at_the_same_step(tmp_path):
    """They agree over gloo, which no device has to wait for."""

    def rank_of_two(rank):
        request, control = StopRequest(), TrainerControl()
        request.deferred = True
        callback, args = StopAtStep(request), SimpleNamespace(world_size=2)
        callback.on_step_end(args, None, control)
        before = control.should_training_stop
        if rank == 1:
            request.handle(signal.SIGTERM, None)
        callback.on_step_end(args, None, control)
        assert torch.distributed.get_backend(callback.group) == "gloo"
        return before, control.should_save, control.should_training_stop, request.received

    first, second = on_two_ranks(rank_of_two, tmp_path)
    assert first == (False, True, True, "a signal to another process")
    assert second == (False, True, True, "SIGTERM")
