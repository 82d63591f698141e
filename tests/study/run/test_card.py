import dataclasses

import pytest
import yaml

from molf.study.config.run_config import RunConfig
from molf.study.run.card import hub_id, model_card
from molf.tasks.base import Metric
from small_runs import small_result


@pytest.fixture
def result():
    config = RunConfig.from_dict({"model_name_or_path": "bundled:smollm2-135m", "output_dir": "out"}).resolved()
    return small_result(config=config.to_dict())


def test_header_settings_and_row_are_yaml(result):
    card = model_card(result)
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["molf", "fact"],
        "datasets": ["NeelNanda/counterfact-tracing"],
    }
    settings, row = (yaml.safe_load(block.split("```")[0]) for block in body.split("```yaml")[1:])
    assert RunConfig.from_dict(settings).to_dict() == result.config
    assert row["metric/score"] == 50.0
    assert "learning_rate" not in row
    assert "| score | 25.00 | 50.00 (40.00, 60.50) | 12 |" in body
    assert "bootstrap 95 % interval" in body


@pytest.mark.parametrize("own", [{"sample": True}, {"data_path": "mine.jsonl"}, {"task": "custom"}])
def test_data_of_ones_own_is_not_said_to_be_the_public_set(result, own):
    changed = dataclasses.replace(result, config=result.config | own)
    assert "datasets:" in model_card(result) and "datasets:" not in model_card(changed)


def test_without_an_evaluation_before(result):
    plain = dataclasses.replace(result, metrics_before=None, metrics={"score": Metric(50.0, 12)})
    assert "| score |  | 50.00 | 12 |" in model_card(plain)
    assert "bootstrap" not in model_card(plain)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bundled:gemma-3-270m", "google/gemma-3-270m"),
        ("org/model", "org/model"),
        ("/some/folder", None),
        ("./model", None),
        ("runs/a/b", None),
        ("folder", None),
        (None, None),
    ],
)
def test_only_hub_ids_are_named_as_the_base(name, expected):
    assert hub_id({"model_name_or_path": name}) == expected


def test_a_folder_that_looks_like_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    assert hub_id({"model_name_or_path": "runs/demo"}) is None
