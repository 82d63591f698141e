"""Evaluation during training: on held-out training rows, and the best checkpoint at the end."""

import copy

import pytest
import torch
from transformers import TrainerCallback

from molf.errors import MolfError
from molf.integrations.merge import merge
from molf.study.run.job import StudyTrainer, load_job
from molf.study.run.selection import row_key
from small_runs import carry_out, small_config, weights

EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}


class KeptAt(TrainerCallback):
    """Keeps the merged model of one step."""

    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, model, **kwargs):
        if state.global_step == self.step:
            self.weights = merge(copy.deepcopy(model)).state_dict()


@pytest.mark.parametrize("method", ["molf", "molf_e", "adalora"])
def test_the_best_model_is_the_one_that_is_kept(settings, callbacks, monkeypatch, method, tmp_path):
    losses = iter([3.0, 1.0, 2.0, 2.0])
    real = StudyTrainer.evaluate
    monkeypatch.setattr(
        StudyTrainer, "evaluate", lambda self, **given: real(self, **given) | {"eval_loss": next(losses)}
    )
    kept = KeptAt(2)
    callbacks.append(kept)
    result = carry_out(settings | EVALUATED, method=method)
    assert (result.training.best_step, result.training.validation_loss) == (2, 1.0)
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} >= {"checkpoint-2", "checkpoint-4"}
    left = weights(tmp_path / "run")
    assert all(torch.equal(left[name], kept.weights[name]) for name in left)


def test_a_resumed_run_knows_the_best_model(settings, callbacks, tmp_path):
    whole = carry_out(settings, **EVALUATED).training
    before = weights(tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    resumed = carry_out(settings, **EVALUATED, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3")).training
    assert (resumed.best_step, resumed.validation_loss) == (whole.best_step, whole.validation_loss)
    assert all(torch.equal(x, before[name]) for name, x in weights(tmp_path / "run").items())


def test_without_a_choice_the_last_model_stays_and_its_loss_is_recorded(settings):
    training = carry_out(settings, eval_strategy="epoch").training
    assert training.best_step is None and training.validation_loss > 0


def test_an_evaluation_that_ends_the_training_hides_no_tokens(settings):
    """TRL logs its counter under another name then, and none at all between the first step and the end."""
    found = [
        carry_out(settings, eval_strategy="steps", eval_steps=every, logging_steps=logs, overwrite=True).training.tokens
        for every, logs in ((3, 1), (2, 3), (4, 10))
    ]
    assert found[0] == found[1] == found[2] > 0


def rows_of(settings, **changes):
    job = load_job(small_config(settings, **changes))
    return job, [set(map(row_key, rows)) for rows in (job.split.train, job.split.eval, job.validation)]


@pytest.mark.parametrize(
    "changes, sizes",
    [
        ({"limit": 8}, (7, 7, 1)),  # facts are evaluated on the rows that are trained on
        ({"limit": 40}, (36, 36, 4)),
        ({"limit": 8, "validation_limit": 3}, (5, 5, 3)),
        ({"task": "med", "limit": 20}, (18, 20, 2)),
        ({"task": "med", "limit": 20, "eval_strategy": "no", "eval_on_start": True}, (18, 20, 2)),
    ],
)
def test_rows_are_held_out_of_training_and_evaluation(settings, changes, sizes):
    job, (train, evaluation, validation) = rows_of(settings, **({"eval_strategy": "steps"} | changes))
    assert tuple(map(len, (job.split.train, job.split.eval, job.validation))) == sizes
    assert not validation & (train | evaluation)
    assert f"without {sizes[2]} training rows for validation" in job.split.origin


def test_rows_for_selection_are_used_where_there_are_some(settings):
    job, _ = rows_of(settings, task="med", limit=20, selection_limit=5, eval_strategy="steps")
    assert len(job.split.train) == 15 and job.validation == job.split.eval
    assert rows_of(settings, selection_limit=5)[0].validation == []


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"validation_limit": 2}, "validation_limit=2 without evaluations during training"),
        ({"validation_limit": 2, "only_eval": True}, "validation_limit=2 without evaluations during training"),
        ({"validation_limit": 8, "eval_strategy": "steps"}, "holds out 8 of the 8 training rows"),
        ({"validation_limit": 2, "selection_limit": 2}, "validation_limit=2 with selection_limit=2"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end needs evaluations during training"),
        ({"save_strategy": "best", "metric_for_best_model": "loss"}, "save_strategy=best needs evaluations"),
        (EVALUATED | {"metric_for_best_model": "f1"}, "metric_for_best_model=f1: .* the loss only"),
        (EVALUATED | {"save_strategy": "no"}, "requires the save and eval strategy to match"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_training(settings, changes, message):
    with pytest.raises(MolfError, match=message):
        rows_of(settings, **changes)
