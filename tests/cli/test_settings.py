from types import NoneType
from typing import Any, get_args

import pytest

from molf.cli.settings import PUBLISHED_NAMES, allows, canonical, is_list, setting_types

KNOWN = ["task", "score", "learning_rate", "per_device_train_batch_size", "warmup_steps"]


def test_aliases_hyphens_and_published_values():
    given = [("dataset-type", "fact"), ("molf_score_fn", "true_projected"), ("learning-rate", "1e-4")]
    expected = {"task": "fact", "score": "epd", "learning_rate": "1e-4"} | {
        "recipe": "published",
        "routing_log": "published",
    }
    assert canonical(given, KNOWN, "here") == expected
    assert canonical([("score", "projected")], KNOWN, "here") == {"score": "pfn"}
    assert canonical([("score", "epd")], KNOWN, "here") == {"score": "epd"}


def test_of_one_name_given_twice_the_later_counts():
    assert canonical([("task", "fact"), ("task", "sql")], KNOWN, "here") == {"task": "sql"}


def test_two_names_of_one_setting_must_agree():
    same = [("per_device_batch_size", "8"), ("per_device_train_batch_size", "8")]
    assert canonical(same, KNOWN, "here") == {"per_device_train_batch_size": "8"}
    assert canonical([("score", "epd"), ("molf_score_fn", "true_projected")], KNOWN, "here")["score"] == "epd"
    with pytest.raises(ValueError, match=r"warm_up_ratio and warmup_steps in here .*'0\.1' and '0\.2'"):
        canonical([("warm_up_ratio", "0.1"), ("warmup_steps", "0.2")], KNOWN, "here")


@pytest.mark.parametrize(
    ("misspelt", "nearest"),
    [("learning_rte", "learning_rate"), ("lr", "learning_rate"), ("dataset_typ", "dataset_type"), ("zzz", None)],
)
def test_unknown_names(misspelt, nearest):
    with pytest.raises(ValueError, match=f"unknown setting '{misspelt}' in here") as raised:
        canonical([(misspelt, "1")], KNOWN, "here")
    assert ("did you mean" in str(raised.value)) is (nearest is not None)
    assert nearest is None or repr(nearest) in str(raised.value)


def test_every_alias_means_a_setting_that_exists():
    assert set(PUBLISHED_NAMES.values()) <= set(setting_types())
    assert not set(PUBLISHED_NAMES) & set(setting_types())


def test_settings_are_those_of_all_sections_and_of_the_trainer():
    types = setting_types()
    assert types["few_shot"] is int and types["ranks"] == (list[int] | None) and types["learning_rate"] is float
    assert "_argument_group_name" not in types


@pytest.mark.parametrize(("mode", "value"), [("adalora", True), ("rslora", False)])
def test_a_published_mode_that_fixes_its_scale_leaves_use_rslora_out(mode, value, caplog):
    known = {"method", "use_rslora", "recipe"}
    values = canonical([("mode", mode), ("use_rslora", value)], known, "the command line")
    assert "use_rslora" not in values
    assert f"use_rslora is left out: mode {mode} does not read it" in caplog.text
    assert "use_rslora" in canonical([("method", mode), ("use_rslora", value)], known, "the command line")


def test_what_a_type_allows():
    for declared in (bool, bool | None, list[int], list[int] | None, dict[str, Any] | str | None):
        assert allows(declared, bool) is (declared in (bool, bool | None))
        assert allows(declared, NoneType) is (NoneType in get_args(declared))
        assert allows(declared, list) is is_list(declared) is (declared in (list[int], list[int] | None))
        assert allows(declared, dict) is (declared == dict[str, Any] | str | None)
    assert allows(str | list[str], list) and not is_list(str | list[str]) and not is_list(str | list[str] | None)


def test_published_flags_choose_the_published_routing_log():
    assert "routing_log" not in canonical([("method", "molf")], setting_types(), "here")
    found = canonical([("molf_topk", 1)], setting_types(), "here")
    assert (found["recipe"], found["routing_log"]) == ("published", "published")
    found = canonical([("molf_topk", 1), ("routing_log", "compact")], setting_types(), "here")
    assert found["routing_log"] == "compact"
