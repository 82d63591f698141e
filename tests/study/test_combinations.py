"""Accumulation and checkpointing change how a step is computed, not what it is."""

import itertools

import pytest
import torch

from conftest import TOLERANCE
from molf.study.config import RunConfig
from molf.study.job import job_recipe, load_job, make_trainer
from small import save_tiny_checkpoint
from small_runs import small_run

OPTIONS = {
    "accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    "checkpointing": {"gradient_checkpointing": True},
}
COMBINATIONS = [names for count in range(1, 3) for names in itertools.combinations(OPTIONS, count)]
METHODS = {"molf": {}, "molf_e": {"method": "molf_e"}}
CASES = [(method, names) for method in METHODS for names in COMBINATIONS]


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """Returns the loss of every step of a run; batches of four examples in every case."""
    folder = tmp_path_factory.mktemp("combinations")
    save_tiny_checkpoint(folder / "model")
    plain = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "logging_steps": 1,
        "learning_rate": 1e-3,
    }

    def run(**changes):
        job = load_job(RunConfig.from_dict(small_run(str(folder / "model"), folder / "run") | plain | changes))
        trainer = make_trainer(job, job_recipe(job))
        trainer.train()
        return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])

    return run


@pytest.fixture(scope="module")
def plain(losses):
    return {name: losses(**changes) for name, changes in METHODS.items()}


@pytest.mark.parametrize(
    ("method", "names"), CASES, ids=lambda part: part if isinstance(part, str) else " + ".join(part)
)
def test_the_loss_is_that_of_the_plain_run(method, names, losses, plain):
    changes = {key: value for name in names for key, value in OPTIONS[name].items()}
    loss = losses(**METHODS[method], **changes)
    assert len(loss) == 4 and loss[-1] < loss[0]
    torch.testing.assert_close(loss, plain[method], rtol=0, atol=TOLERANCE[torch.float32])
