import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from molf.errors import MolfError
from molf.integrations.checkpoint_folder import checkpoints
from molf.integrations.routing_lines import LOG_FILES
from molf.study.config.run_config import RunConfig
from molf.study.engine.evaluate import evaluate
from molf.study.faults.preemption import Preempted
from molf.study.faults.trained import TRAINED_FILE, find_trained
from small_runs import NoStep, carry_out, weights

ROUTING_LOG = LOG_FILES["compact"]


class SignalAtTheEnd(TrainerCallback):
    def on_train_end(self, args, state, control, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)


def stopped_in_evaluation(settings, monkeypatch, **changes):
    """Carry out a run that gets SIGTERM in the evaluation after training."""

    def told(model, *given, **more):
        if (Path(settings["output_dir"]) / TRAINED_FILE).exists():
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(model, *given, **more)

    with monkeypatch.context() as patch:
        patch.setattr("molf.study.run.train.evaluate", told)
        with pytest.raises(Preempted, match="75") as stopped:
            carry_out(settings, **changes)
    assert "--resume_from_checkpoint True to keep what it has trained" in stopped.value.message
    assert not (Path(settings["output_dir"]) / "result.json").exists()


@pytest.mark.parametrize(
    "changes",
    [
        *({"method": method} for method in ("molf", "molf_e", "pissa")),
        {"method": "molf", "lora_dropout": 0.1},
        {"method": "molf", "dtype": "bfloat16"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_stopped_in_its_evaluation_a_run_is_only_evaluated(changes, settings, callbacks, monkeypatch, finished):
    whole, there = vars(finished(**changes)).values()
    folder, settings = Path(settings["output_dir"]), settings | {"eval_before": True}
    stopped_in_evaluation(settings, monkeypatch, **changes)
    assert not checkpoints(folder)
    callbacks.append(NoStep())
    result = carry_out(settings, **changes, resume_from_checkpoint=True)
    assert (result.metrics, result.metrics_before) == (whole.metrics, whole.metrics_before)
    assert result.routing == whole.routing
    spent = {"seconds": 0.0, "tokens_per_second": None}
    assert replace(result.training, **spent) == replace(whole.training, **spent)
    left = {path.name for path in there.iterdir()} - {"checkpoint-2", "checkpoint-4"}
    assert {path.name for path in folder.iterdir()} == left
    assert all(torch.equal(tensor, weights(there)[name]) for name, tensor in weights(folder).items())
    if ROUTING_LOG in left:
        assert (folder / ROUTING_LOG).read_text() == (there / ROUTING_LOG).read_text()


def test_told_to_stop_after_the_last_step_the_model_is_saved_first(settings, callbacks):
    callbacks.append(SignalAtTheEnd())
    with pytest.raises(Preempted, match="75") as stopped:
        carry_out(settings)
    assert "stopped by SIGTERM after step 4 of 4; start it again with --resume" in stopped.value.message
    callbacks[:] = [NoStep()]
    assert carry_out(settings, resume_from_checkpoint=True).training.steps == 4


def test_a_trained_model_is_not_lost_silently(settings, callbacks, monkeypatch):
    stopped_in_evaluation(settings, monkeypatch)
    with pytest.raises(ValueError, match="holds an unfinished run that can resume; pass --overwrite"):
        carry_out(settings)
    words = (
        r"holds a trained model that is not evaluated yet. It was trained with seed=\d+ \(here 7\). Use the settings"
    )
    with pytest.raises(ValueError, match=words):
        carry_out(settings, seed=7, resume_from_checkpoint=True)
    callbacks.append(NoStep())
    result = carry_out(settings, eval_limit=3, eval_batch_tokens=512, resume_from_checkpoint=True)
    assert result.metrics["efficacy_score"].n == 3, "how it is evaluated may change"


@pytest.mark.parametrize(
    "content", ["", "[]", '{"config": {}}', '{"config": 1, "training": {}, "metrics_before": null}']
)
def test_a_damaged_note_is_named(content, settings):
    config = RunConfig.from_dict(settings | {"resume_from_checkpoint": True})
    config.output_dir.mkdir()
    (config.output_dir / TRAINED_FILE).write_text(content)
    with pytest.raises(MolfError, match=r".trained.json, the note that this model is trained, is damaged: "):
        find_trained(config, main=True)


def test_a_trained_model_is_not_lost_if_its_checkpoints_are_damaged(settings, monkeypatch):
    changes = {"save_strategy": "steps", "save_steps": 2}
    stopped_in_evaluation(settings, monkeypatch, **changes)
    for checkpoint in checkpoints(Path(settings["output_dir"])):
        (checkpoint / "optimizer.pt").write_bytes(b"cut")
    with pytest.raises(ValueError, match="holds a trained model that is not evaluated yet"):
        carry_out(settings, **changes, num_train_epochs=3, resume_from_checkpoint=True)


def test_a_longer_training_goes_on_from_the_last_checkpoint(settings, monkeypatch):
    changes = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    stopped_in_evaluation(settings, monkeypatch, **changes)
    result = carry_out(settings, **changes, num_train_epochs=3, resume_from_checkpoint=True)
    assert result.training.steps == 6
    assert not (Path(settings["output_dir"]) / TRAINED_FILE).exists()


def test_trained_anew_it_is_no_longer_trained(settings, callbacks, monkeypatch):
    """Killed while it trains again, a run must not take the model of before for its own."""
    stopped_in_evaluation(settings, monkeypatch)

    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise ZeroDivisionError

    callbacks.append(Fail())
    with pytest.raises(ZeroDivisionError):
        carry_out(settings, overwrite=True)
    assert not (Path(settings["output_dir"]) / TRAINED_FILE).exists()
