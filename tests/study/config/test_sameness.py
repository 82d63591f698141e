from dataclasses import fields

import pytest
import yaml

from molf.errors import MolfError
from molf.study.config.fields import SHAPES, TRAINER_LEVELS
from molf.study.config.run_config import SECTIONS, RunConfig
from molf.study.config.sameness import differing, shaping
from molf.study.config.trainer_config import TrainConfig


@pytest.mark.parametrize("earlier", [{"limit": "seven"}, {"limit": []}, {"few_shot": None}])
def test_settings_that_are_none_are_one_message(earlier):
    with pytest.raises(MolfError, match="the settings of the earlier run are not those of a run: "):
        differing(earlier, RunConfig(), "training")


def config(**changes):
    return RunConfig.from_dict({"task": "fact", "method": "lora", **changes})


@pytest.mark.parametrize(
    ("changes", "evaluation", "training", "checkpoint"),
    [
        ({"output_root": "elsewhere", "overwrite": True, "save_strategy": "steps", "save_steps": 3}, [], [], []),
        ({"eval_limit": 3}, ["eval_limit=None (here 3)"], [], []),
        ({"num_train_epochs": 3}, *[["num_train_epochs=2.0 (here 3)"]] * 2, []),
        ({"seed": 7}, *[["seed=42 (here 7)"]] * 3),
        ({"method": "rslora"}, *[["method=lora (here rslora)", "use_rslora=False (here True)"]] * 3),
    ],
)
def test_each_level_includes_the_ones_after_it(changes, evaluation, training, checkpoint):
    there, here = config().to_dict(), config(**changes)
    assert differing(there, here, "evaluation") == evaluation
    assert differing(there, here, "training") == training
    assert differing(there, here, "checkpoint") == checkpoint


def test_a_setting_that_is_not_given_is_at_its_default():
    assert differing(config().to_dict(), config(max_length=1024), "checkpoint") == []
    assert differing(config().to_dict(), config(max_length=9), "checkpoint") == ["max_length=1024 (here 9)"]
    assert differing(config(max_length=9).to_dict(), config(), "checkpoint") == ["max_length=9 (here 1024)"]


def test_settings_of_other_versions_are_no_difference():
    earlier = {name: value for name, value in config().to_dict().items() if name != "optim_bits"}
    assert differing(earlier | {"retired": 1}, config(), "nothing") == []


def test_settings_are_compared_as_a_file_gives_them_back():
    here = config(ranks=[2, 4], lora_learning_rate=1e-5, output_dir="here")
    assert differing(yaml.safe_load(yaml.safe_dump(here.to_dict())), here, "nothing") == []


def test_every_name_is_one_of_a_setting():
    assert {f.name for f in fields(TrainConfig)} >= TRAINER_LEVELS.keys()
    assert all(SHAPES in f.metadata for section in SECTIONS.values() for f in fields(section))
    assert shaping("evaluation") == ["eval_limit", "eval_batch_tokens", "generation_backend"]
