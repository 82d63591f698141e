"""A user's own rows through whole runs: trained, evaluated, recorded."""

import json

import pytest

from molf.study.results.result import check_predictions
from small_runs import carry_out

PAIRS = [
    {"prompt": f"The capital of {name} is", "completion": f" {name[::-1]}"} for name in ("Italy", "France", "Rome")
]


@pytest.fixture
def own(settings, tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS * 4))
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    fitting = {"learning_rate": 1e-2, "num_train_epochs": 50, "lr_scheduler_type": "constant", "method": "fft"}
    fitting |= {"per_device_train_batch_size": 12, "gradient_accumulation_steps": 1}
    paths = {"data_path": str(tmp_path / "train.jsonl"), "eval_path": str(tmp_path / "held.jsonl")}
    return settings | fitting | paths | {"task": "custom", "sample": False, "limit": None}


def test_rows_are_learned_and_every_number_can_be_traced(own, tmp_path):
    result = carry_out(own, eval_before=True)
    assert result.headline == "token_accuracy"
    assert result.metrics["loss"].value < 0.5 * result.metrics_before["loss"].value
    assert (result.metrics["exact_match"].value, result.metrics_before["exact_match"].value) == (100, 0)
    assert result.data_origin == f"{own['data_path']}, evaluation: {own['eval_path']}"
    assert (result.training.dropped_examples, result.training.truncated_examples) == (0, 0)
    check_predictions(tmp_path / "run", result)
    elsewhere = {"model_name_or_path": str(tmp_path / "run"), "output_dir": str(tmp_path / "eval")}
    alone = carry_out(own, **elsewhere, data_path=None, only_eval=True)
    assert alone.metrics == result.metrics


def test_what_max_length_cuts_is_recorded_and_told(own, tmp_path, caplog):
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*PAIRS, {"prompt": "x", "completion": " y" * 90}])
    )
    result = carry_out(own, max_length=60, num_train_epochs=1)
    assert (result.training.dropped_examples, result.training.truncated_examples) == (0, 1)
    assert "1 examples lose the end of their target to max_length=60" in caplog.text
