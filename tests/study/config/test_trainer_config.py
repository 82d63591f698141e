import os

import pytest

from molf.errors import MolfError
from molf.study.config import trainer_config
from molf.study.config.run_config import PUBLISHED_RECIPE
from molf.study.config.trainer_config import TrainConfig, build_train_config


def test_defaults_are_the_published_recipe(tmp_path):
    built = build_train_config({"output_dir": str(tmp_path)})
    for name, value in PUBLISHED_RECIPE.items():
        if name != "report_to":  # the trainer turns "none" into a list
            assert getattr(built, name) == value
    assert built.report_to == []


def test_an_unknown_setting_names_the_nearest():
    with pytest.raises(ValueError, match=r"'learning_rte'; did you mean 'learning_rate'"):
        build_train_config({"learning_rte": 1.0})


@pytest.mark.parametrize("accelerator", [True, False])
def test_bf16_where_the_accelerator_has_it(accelerator, monkeypatch, tmp_path):
    for module in ("molf.study.config.trainer_config", "transformers.training_args"):
        monkeypatch.setattr(f"{module}.is_torch_bf16_gpu_available", lambda: accelerator)
    assert TrainConfig(output_dir=str(tmp_path)).bf16 is accelerator
    assert TrainConfig(output_dir=str(tmp_path), use_cpu=True).bf16 is False
    assert TrainConfig(output_dir=str(tmp_path), bf16=False).bf16 is False


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_by_either_name(name, tmp_path):
    assert TrainConfig(output_dir=str(tmp_path)).gradient_checkpointing is True
    assert TrainConfig(output_dir=str(tmp_path), **{name: False}).gradient_checkpointing is False


def test_telemetry_is_off():
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"deepspeed": "zero3.json"}, "deepspeed is not supported.*--fsdp True"),
        ({"save_only_model": True}, "save_only_model=True would leave checkpoints that no run can resume from"),
        (
            {"model_init_kwargs": {"revision": "main"}},
            "model_init_kwargs={'revision': 'main'} has no effect, as a model is",
        ),
        (
            {"dataset_text_field": "content"},
            "dataset_text_field=content has no effect, as texts are in the column text",
        ),
        ({"dataset_kwargs": {"skip_prepare_dataset": True}}, "dataset_kwargs=.* has no effect, as rows are always"),
        ({"eval_strategy": "epoch", "greater_is_better": True}, "greater_is_better=True would keep .* highest loss"),
        ({"push_to_hub": True}, "push_to_hub=True uploads checkpoints, and save_strategy=no writes none"),
        ({"report_to": "wandbb"}, "report_to=wandbb is not a tracker; did you mean 'wandb'"),
        ({"learning_rate": float("inf")}, "learning_rate=inf must be a finite number"),
        ({"learning_rate": -1e-3}, r"learning_rate=-0\.001 must be 0 or more"),
        ({"logging_steps": float("inf")}, "logging_steps=inf must be a finite number"),
        ({"weight_decay": -0.1}, r"weight_decay=-0\.1 must be 0 or more"),
        ({"max_grad_norm": -1.0}, r"max_grad_norm=-1\.0 must be 0 or more"),
        ({"adam_beta1": 1.0}, r"adam_beta1=1\.0 must be at least 0 and below 1"),
        ({"adam_beta2": -0.1}, r"adam_beta2=-0\.1 must be at least 0 and below 1"),
        ({"label_smoothing_factor": 2.0}, r"label_smoothing_factor=2\.0 must be at least 0 and below 1"),
        ({"adam_epsilon": 0.0}, r"adam_epsilon=0\.0 must be above 0, as steps are divided by"),
        ({"report_to": ["none", "comet_ml"]}, "report_to=comet_ml: the tracker is not installed; pip install comet_ml"),
    ],
)
def test_what_cannot_be_used_says_what_can(settings, message, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_config, "get_available_reporting_integrations", lambda: ["tensorboard"])
    monkeypatch.setattr(trainer_config, "HF_HUB_OFFLINE", False)
    with pytest.raises(MolfError, match=message):
        build_train_config({"output_dir": str(tmp_path), **settings})


def test_accelerates_deepspeed_is_refused_too(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(MolfError, match="deepspeed is not supported"):
        build_train_config({"output_dir": str(tmp_path)})
