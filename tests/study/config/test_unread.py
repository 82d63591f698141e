import re
from dataclasses import fields
from typing import get_args

import pytest

from molf.errors import MolfError
from molf.study.config.fields import READ_BY, TRAINER_READ_BY
from molf.study.config.method_config import Method, MethodConfig
from molf.study.config.run_config import SECTIONS, RunConfig
from molf.study.config.sameness import differing
from molf.study.config.trainer_config import TrainConfig
from molf.study.config.unread import check_read, unread

METHODS = get_args(Method)
OTHER = {
    "allocation": "recipe.yaml",
    "routing_log": "published",
    "routing_log_every": 3,
    "ranks": [2], "lora_rank": 3, "lora_learning_rate": 1e-3, "lora_weight_decay": 0.5, "lora_alpha": 7.0, "lora_dropout": 0.5,
    "loraplus_lr_ratio": 2.0, "top_k": 2, "score": "pfn", "match_lora_rate": True, "recipe": "published", "optim_bits": 8,
    "bf16_update": "stochastic",
    "optimizer_in_backward": True, "fused": True, "freeze_non_linear": True, "fft_expert": True, "use_rslora": True,
    "target_modules": ["q_proj"], "exclude_modules": [], "target_parameters": ["router.weight"],
    "optim": "sgd", "optim_args": "momentum=0.5", "optim_target_modules": ["q_proj"], "weight_decay": 0.5,
}  # fmt: skip
"""A value of every setting that some method does not read, other than its default."""


def test_every_setting_that_a_method_may_not_read_is_tried_here():
    declared = {f.name for section in SECTIONS.values() for f in fields(section) if READ_BY in f.metadata}
    assert OTHER.keys() == declared | TRAINER_READ_BY.keys() | {"target_modules", "exclude_modules"}
    assert {f.name for f in fields(TrainConfig)} >= TRAINER_READ_BY.keys()


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_does_not_read_is_refused_by_name(method):
    for name in unread(method):
        given = {"method": method, name: OTHER[name]}
        if (method, name) == ("adalora", "use_rslora"):
            continue  # a contradiction
        with pytest.raises(
            MolfError, match=rf"^method {method} does not read {name}={re.escape(str(OTHER[name]))} \(read by "
        ):
            check_read(RunConfig.from_dict(given))
        check_read(RunConfig.from_dict(given | {"only_eval": True}))
    for name in OTHER.keys() - unread(method) - {"match_lora_rate", "freeze_non_linear", "fft_expert", "use_rslora"}:
        check_read(RunConfig.from_dict({"method": method, name: OTHER[name]}))


@pytest.mark.parametrize("method", METHODS)
def test_a_default_is_never_refused_nor_what_a_run_writes_of_itself(method):
    check_read(RunConfig.from_dict({"method": method}))
    written = RunConfig.from_dict({"method": method}).resolved().to_dict()
    check_read(RunConfig.from_dict(written))
    assert not differing(written, RunConfig.from_dict(written), "nothing")
    defaults = {
        f.name: getattr(MethodConfig(), f.name) for f in fields(MethodConfig) if f.name in ("ranks", "top_k", "score")
    }
    check_read(RunConfig.from_dict(defaults | {"method": method} if method != "molf_e" else {}))
    check_read(RunConfig.from_dict({"method": method, "optim": TrainConfig.optim, "weight_decay": 0.1}))


def test_all_are_named_at_once_with_what_to_do():
    config = RunConfig.from_dict({"method": "lora", "ranks": [4], "optim_bits": 8, "weight_decay": 0.3, "top_k": 1})
    with pytest.raises(MolfError) as raised:
        check_read(config)
    assert str(raised.value) == (
        "method lora does not read ranks=[4] (read by molf, molf_e): give lora_rank; optim_bits=8 (read by molf, molf_e): leave "
        "it out; weight_decay=0.3 (read by molf, fft, static): give lora_weight_decay"
    )


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({"method": "fft", "target_modules": ["q_proj"]}, True),
        ({"method": "fft", "target_modules": ["q_proj"], "freeze_non_linear": True}, False),
        ({"method": "molf_e", "weight_decay": 0.5}, True),
        ({"method": "molf_e", "weight_decay": 0.5, "freeze_non_linear": False}, False),
        ({"method": "molf", "fft_expert": False, "weight_decay": 0.5}, True),
    ],
)
def test_some_are_read_only_with_others(settings, refused):
    if not refused:
        return check_read(RunConfig.from_dict(settings))
    with pytest.raises(MolfError, match="does not read .*: give freeze_non_linear=(True|False) too, or leave it out$"):
        check_read(RunConfig.from_dict(settings))


def test_an_evaluation_measures_no_retention():
    with pytest.raises(MolfError, match="retention_path='other.jsonl' for an evaluation.*leave it out"):
        check_read(RunConfig.from_dict({"only_eval": True, "retention_path": "other.jsonl"}))
    check_read(RunConfig.from_dict({"only_eval": True, "retention": False}))
