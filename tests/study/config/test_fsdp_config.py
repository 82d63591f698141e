import re

import pytest
import transformers

from molf.study.config.trainer_config import TrainConfig


@pytest.fixture
def resolved(tmp_path):
    """Settings of a sharded run, with what is given of them."""

    def build(**given):
        return TrainConfig(**{"output_dir": str(tmp_path), "use_cpu": True, "fsdp": True, **given})

    return build


@pytest.mark.parametrize("given", [True, "True"])
def test_sharded_runs_write_shards_and_recompute_by_fsdp(given, resolved):
    config = resolved(fsdp=given, gradient_checkpointing=True)
    assert config.fsdp is True
    assert config.fsdp_plugin_args["state_dict_type"] == "SHARDED_STATE_DICT"
    assert config.fsdp_plugin_args["activation_checkpointing"] is True
    assert not config.gradient_checkpointing, "which would gather a block's weights once more"


def test_what_is_asked_of_fsdp_is_kept(resolved):
    asked = '{"state_dict_type": "FULL_STATE_DICT", "activation_checkpointing": false, "reshard_after_forward": false}'
    config = resolved(fsdp="True", fsdp_config=asked)
    assert config.fsdp_plugin_args["state_dict_type"] == "FULL_STATE_DICT"
    assert config.fsdp_plugin_args["activation_checkpointing"] is False
    assert config.fsdp_plugin_args["reshard_after_forward"] is False


def test_a_file_is_read_as_what_is_in_it(resolved, tmp_path):
    (tmp_path / "fsdp.json").write_text('{"reshard_after_forward": false}', encoding="utf-8")
    for given in (str(tmp_path / "fsdp.json"), '{"reshard_after_forward": false}', {"reshard_after_forward": False}):
        config = resolved(fsdp_config=given, gradient_checkpointing=True)
        assert config.fsdp_plugin_args["state_dict_type"] == "SHARDED_STATE_DICT"
        assert config.fsdp_plugin_args["activation_checkpointing"] is True
        assert config.fsdp_plugin_args["reshard_after_forward"] is False
        assert type(config.fsdp_config) is dict


def test_no_sharding_unless_asked(resolved):
    for given in ("False", None):
        assert resolved(fsdp=given).fsdp_plugin_args is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("{no JSON", r"fsdp_config=\{no JSON is not a JSON object .* give one, or the name of a JSON file"),
        ("nowhere", "fsdp_config=nowhere is neither a JSON object nor a file"),
        ([1], r"fsdp_config=\[1\] is not a JSON object but list"),
    ],
)
@pytest.mark.parametrize("fsdp", [True, False])
def test_what_is_no_object_is_named(given, words, fsdp, resolved):
    with pytest.raises(ValueError, match=words):
        resolved(fsdp=fsdp, fsdp_config=given)


@pytest.mark.parametrize("prefix", ["", "fsdp_"])
def test_keys_are_taken_with_and_without_prefix_and_misspelt_ones_refused(prefix, resolved):
    right, name = f"{prefix}reshard_after_forward", f"{prefix}reshard_after_foward"
    assert resolved(fsdp_config={right: False}).fsdp_plugin_args["reshard_after_forward"] is False
    words = f"unknown key '{name}' in fsdp_config; did you mean 'reshard_after_forward'?"
    with pytest.raises(ValueError, match=re.escape(words)):
        resolved(fsdp_config={"version": 2, name: False})
    with pytest.raises(ValueError, match="unknown key 'use_orig_params' in fsdp_config"):  # of version 1
        resolved(fsdp_config={"use_orig_params": True})


def test_all_keys_that_transformers_documents_are_known(resolved):
    """``xla_fsdp_settings`` is read with ``xla`` only."""
    with pytest.raises(ValueError, match="unknown key 'nothing'") as error:
        resolved(fsdp_config={"nothing": 1})
    said = str(error.value)
    assert "did you mean" not in said and "(the Trainer reads " in said
    listed = set(said.rsplit("reads ", 1)[1].removesuffix(")").split(", "))
    documented = transformers.TrainingArguments.__doc__.split("fsdp_config (`str` or `dict`")[1].split("> DeepSpeed")[0]
    documented = set(re.findall(r"- (\w+) \(", documented)) - {"xla_fsdp_settings"}
    assert len(documented) >= 10 and documented <= listed
