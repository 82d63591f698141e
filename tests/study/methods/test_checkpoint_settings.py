import json
from types import SimpleNamespace

import pytest
import torch

from molf.errors import MolfError
from molf.integrations.checkpoint_folder import SETTINGS_FILE
from molf.study.config.run_config import RunConfig
from molf.study.config.trainer_config import build_train_config
from molf.study.methods.checkpoint_settings import CheckpointSettings, model_fingerprint

DATA = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]


def made(data=DATA, sharded=False, processes=1, template="{{ a }}", **changes):
    """The settings that a run on this number of processes saves with its checkpoints."""
    config = RunConfig.from_dict({"method": "lora", "lora_rank": 4, "learning_rate": 1e-3, **changes})
    args = build_train_config(config.train | {"output_dir": "here"})
    args.__dict__["distributed_state"] = SimpleNamespace(num_processes=processes)
    return CheckpointSettings(config, args, data, sharded, template=template)


def test_the_same_and_what_may_change(tmp_path):
    made().save(None, tmp_path)
    made().check(tmp_path)
    made(num_train_epochs=7, max_steps=9, save_steps=3, logging_steps=1, output_root="elsewhere").check(tmp_path)
    made(chat_template_path="moved.jinja").check(tmp_path)
    made(data_path="moved", gradient_accumulation_steps=2, processes=2).check(tmp_path)


def test_a_tokenizer_may_have_several_templates(tmp_path):
    made(template={"default": "{{ a }}", "tool_use": "{{ b }}"}).save(None, tmp_path)
    made(template={"tool_use": "{{ b }}", "default": "{{ a }}"}).check(tmp_path)
    with pytest.raises(MolfError, match="chat_template=SHA-256"):
        made(template={"default": "{{ a }}", "tool_use": "{{ c }}"}).check(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_rank": 8}, r"was made with lora_rank=4 \(here 8\): use the settings"),
        (
            {"method": "rslora", "dtype": "bfloat16"},
            r"dtype=float32 \(here bfloat16\), method=lora \(here rslora\), use_rslora",
        ),
        ({"processes": 2}, r"examples_per_step=32 \(here 64\): use the settings"),
        ({"per_device_train_batch_size": 4}, r"examples_per_step=32 \(here 16\)"),
        ({"seed": 7}, r"seed=42 \(here 7\)"),
        ({"max_length": 9, "packing": True}, r"max_length=1024 \(here 9\), packing=False \(here True\)"),
        (
            {"learning_rate": 1e-4, "lr_scheduler_type": "linear"},
            r"learning_rate=0.001 \(here 0.0001\), lr_scheduler_type=cosine",
        ),
        ({"data": DATA[:1]}, r"=2 examples of fact, SHA-256 \w{12} \(here 1 examples of fact, SHA-256 \w{12}\)"),
        ({"data": DATA[::-1]}, "training_data=2 examples of fact"),
        ({"max_grad_norm": 3.0}, r"max_grad_norm=1.0 \(here 3.0\)"),
        ({"label_smoothing_factor": 0.1}, r"label_smoothing_factor=0.0 \(here 0.1\)"),
        ({"eos_token": "<|end|>"}, r"eos_token=None \(here <\|end\|>\)"),
        ({"loss_type": "dft"}, r"loss_type=\w+ \(here dft\)"),
        ({"neftune_noise_alpha": 5.0}, r"neftune_noise_alpha=None \(here 5.0\)"),
        (
            {"optim": "sgd", "optim_args": "momentum=0.9"},
            r"optim=\w+ \(here sgd\), optim_args=None \(here momentum=0.9\)",
        ),
        ({"adam_beta2": 0.95}, r"adam_beta2=0.999 \(here 0.95\)"),
        ({"lora_weight_decay": 0.5}, r"lora_weight_decay=0.01 \(here 0.5\)"),
        ({"ignore_data_skip": True}, r"ignore_data_skip=False \(here True\)"),
        ({"auto_find_batch_size": True}, r"auto_find_batch_size=False \(here True\)"),
        ({"attn_implementation": "eager"}, r"attn_implementation=None \(here eager\)"),
        ({"accelerator_config": {"use_seedable_sampler": False}}, r"accelerator_config=.*True.* \(here .*False"),
        ({"template": "{{ other }}"}, r"chat_template=SHA-256 \w{12} \(here SHA-256 \w{12}\)"),
    ],
)
def test_what_differs_is_named(changes, words, tmp_path):
    made().save(None, tmp_path)
    with pytest.raises(ValueError, match=words):
        made(**changes).check(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"max_grad_norm": 3.0}, {"max_grad_norm": 0.0}, {"score": "pfn"}, {"top_k": 2}, {"bf16": True}, {"adam_epsilon": 1e-6},
        {"adam_beta1": 0.8}, {"lora_weight_decay": 0.5}, {"lora_alpha": 8.0}, {"match_lora_rate": False}, {"weight_decay": 0.5},
        {"label_smoothing_factor": 0.1}, {"bf16_update": "stochastic"}, {"optim_bits": 8},
    ],
    ids=str,
)  # fmt: skip
def test_settings_of_molf_are_compared_though_the_trainer_has_others(change, tmp_path):
    """The Trainer does not clip, as MoLF does it."""
    own = {"method": "molf", "lora_rank": 128}

    def part(**changes):
        config = RunConfig.from_dict({"output_dir": "here", "use_cpu": True, **own, **changes})
        args = build_train_config(config.train | {"max_grad_norm": 0.0})
        return CheckpointSettings(config, args, DATA)

    part().save(None, tmp_path)
    part().check(tmp_path)
    with pytest.raises(MolfError, match=next(iter(change))):
        part(**change).check(tmp_path)


def test_a_model_is_known_by_its_values():
    model, other = (torch.nn.Linear(3, 2) for _ in range(2))
    assert model_fingerprint(model) != model_fingerprint(other)
    other.load_state_dict(model.state_dict())
    assert model_fingerprint(model) == model_fingerprint(other)


def test_a_plain_trainers_checkpoint_is_not_asked(tmp_path):
    made().check(tmp_path)
    assert not (tmp_path / SETTINGS_FILE).exists()


def test_an_earlier_checkpoint_is_asked_about_what_it_has(tmp_path):
    earlier = {name: made().settings[name] for name in ("method", "lora_rank")}
    (tmp_path / SETTINGS_FILE).write_text(json.dumps(earlier), encoding="utf-8")
    made(seed=7).check(tmp_path)
    with pytest.raises(ValueError, match=r"was made with lora_rank=4 \(here 8\): use the settings"):
        made(lora_rank=8, seed=7).check(tmp_path)


def test_shards_are_no_whole_checkpoint(tmp_path):
    """A checkpoint of a version without sharding counts as unsharded."""
    made().save(None, tmp_path)
    with pytest.raises(ValueError, match=r"sharded=False \(here True\)"):
        made(sharded=True).check(tmp_path)
    made(sharded=True).save(None, tmp_path)
    made(sharded=True).check(tmp_path)
    with pytest.raises(ValueError, match=r"sharded=True \(here False\)"):
        made().check(tmp_path)
    (tmp_path / SETTINGS_FILE).write_text('{"method": "lora"}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"sharded=False \(here True\)"):
        made(sharded=True).check(tmp_path)
