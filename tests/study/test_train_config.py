import os

import pytest

from molf.study.config import PUBLISHED_RECIPE
from molf.study.train_config import TrainConfig, build_train_config


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
    for module in ("molf.study.train_config", "transformers.training_args"):
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


@pytest.mark.parametrize("given", [True, "True"])
def test_sharded_runs_write_shards_and_recompute_by_fsdp(given, tmp_path):
    config = TrainConfig(output_dir=str(tmp_path), use_cpu=True, fsdp=given, gradient_checkpointing=True)
    assert config.fsdp is True
    assert config.fsdp_plugin_args["state_dict_type"] == "SHARDED_STATE_DICT"
    assert config.fsdp_plugin_args["activation_checkpointing"] is True
    assert not config.gradient_checkpointing, "which would gather a block's weights once more"


def test_what_is_asked_of_fsdp_is_kept(tmp_path):
    asked = '{"state_dict_type": "FULL_STATE_DICT", "activation_checkpointing": false, "reshard_after_forward": false}'
    config = TrainConfig(output_dir=str(tmp_path), use_cpu=True, fsdp="True", fsdp_config=asked)
    assert config.fsdp_plugin_args["state_dict_type"] == "FULL_STATE_DICT"
    assert config.fsdp_plugin_args["activation_checkpointing"] is False
    assert config.fsdp_plugin_args["reshard_after_forward"] is False
    (tmp_path / "fsdp.json").write_text(asked, encoding="utf-8")
    config = TrainConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        fsdp=True,
        fsdp_config=str(tmp_path / "fsdp.json"),
        gradient_checkpointing=False,
    )
    assert config.fsdp_plugin_args["state_dict_type"] == "FULL_STATE_DICT"


def test_a_file_is_read_as_what_is_in_it(tmp_path):
    (tmp_path / "fsdp.json").write_text('{"reshard_after_forward": false}', encoding="utf-8")
    for given in (str(tmp_path / "fsdp.json"), '{"reshard_after_forward": false}'):
        config = TrainConfig(
            output_dir=str(tmp_path), use_cpu=True, fsdp=True, fsdp_config=given, gradient_checkpointing=True
        )
        assert config.fsdp_plugin_args["state_dict_type"] == "SHARDED_STATE_DICT"
        assert config.fsdp_plugin_args["activation_checkpointing"] is True
        assert config.fsdp_plugin_args["reshard_after_forward"] is False


def test_no_sharding_unless_asked(tmp_path):
    for given in ("False", None):
        assert TrainConfig(output_dir=str(tmp_path), use_cpu=True, fsdp=given).fsdp_plugin_args is None


def test_a_broken_fsdp_config_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"fsdp_config=\{no JSON is no JSON object .* give one, or the name of a JSON file"
    ):
        TrainConfig(output_dir=str(tmp_path), use_cpu=True, fsdp=True, fsdp_config="{no JSON")


def test_a_missing_fsdp_config_is_named(tmp_path):
    with pytest.raises(ValueError, match="fsdp_config=nowhere is neither a JSON object nor a file"):
        TrainConfig(output_dir=str(tmp_path), use_cpu=True, fsdp=True, fsdp_config="nowhere")
