import dataclasses
import json

import pytest

from molf.errors import MolfError
from molf.study.engine.predictions import write_predictions
from molf.study.results.result import Result, check_predictions, read_result, write_result
from molf.tasks.base import Metric
from small_runs import small_result


@pytest.fixture
def result():
    metrics = {"score": Metric(50.0, 12, 40.0, 60.5), "other": Metric(1.5, 4)}
    return small_result(
        config={"method": "molf", "ranks": [4, 8], "limit": None},
        metrics=metrics,
        routing={"fft": 0.25, "lora_r4": 0.75},
        seconds=1.5,
        peak_memory_bytes=None,
    )


def test_a_result_survives_its_file(result, tmp_path):
    path = write_result(tmp_path, result)
    assert path.name == "result.json"
    assert read_result(tmp_path) == read_result(path) == result
    score = json.loads(path.read_text())["metrics"]["score"]
    assert score == {"value": 50.0, "n": 12, "low": 40.0, "high": 60.5}
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_an_evaluation_has_no_training(result, tmp_path):
    evaluation = dataclasses.replace(result, training=None, routing=None, metrics_before=None)
    write_result(tmp_path, evaluation)
    assert read_result(tmp_path) == evaluation
    assert not [name for name in evaluation.row() if name.startswith(("training/", "routing/", "before/"))]


def test_a_row_is_flat(result):
    row = result.row()
    assert row["ranks"] == "[4, 8]"
    assert row["metric/score"] == 50.0
    assert row["metric/score/n"] == 12
    assert (row["metric/score/low"], row["metric/score/high"]) == (40.0, 60.5)
    assert "metric/other/low" not in row
    assert row["before/score"] == 25.0
    assert row["training/steps"] == 6
    assert row["routing/fft"] == 0.25
    assert not [value for value in row.values() if isinstance(value, list | dict)]


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"metrics": {}, "unknown": 1}'])
def test_what_is_no_result_is_refused(content, tmp_path):
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(ValueError, match="is not a result of this version"):
        read_result(tmp_path)


DAMAGE = {
    "headline": [1], "metrics": [], "metrics_before": 3, "config": [["a"]], "seconds": "long", "device": None,
    "peak_memory_bytes": 1.5, "versions": {"molf": 1}, "training": [], "routing": {"fft": "half"}, "run_id": 7, "commit": {},
    "data_origin": False,
}  # fmt: skip


@pytest.mark.parametrize(
    "damage",
    [
        *({name: value} for name, value in DAMAGE.items()),
        *(
            {"metrics": {"score": value}}
            for value in (None, 1, [], {}, {"value": "1", "n": 2}, {"value": 1.0, "n": 2.5})
        ),
        {"training": {"steps": 1}},
        {"seconds": 10**400},
        {"config": {"run_name": "\ud800"}},
        {"config": {"deep": json.loads("[" * 150 + "]" * 150)}},
    ],
    ids=str,
)
def test_a_result_of_other_types_is_refused_in_one_line(damage, result, tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(result.to_dict() | damage))
    with pytest.raises(MolfError, match=r"result.json is not a result of this version of molf: ") as raised:
        read_result(tmp_path)
    assert "\n" not in str(raised.value)


def test_an_unfinished_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no finished run"):
        read_result(tmp_path)


@pytest.fixture
def predicted(tmp_path):
    """A folder with predictions of one edit, and the result that they give."""
    record = {
        "case_id": 1,
        "requested_rewrite": {
            "prompt": "The capital of {} is",
            "subject": "France",
            "target_new": {"str": "Rome"},
            "target_true": {"str": "Paris"},
        },
        "paraphrase_prompts": [],
        "neighborhood_prompts": [],
    }
    scores = {"token_ids": [1], "greedy": [False]}
    answers = [{"logprobs": [-1.0], **scores}, {"logprobs": [-2.0], **scores, "token_ids": [2]}, {"text": " Rome"}]
    write_predictions(tmp_path / "predictions.jsonl.gz", [{"row": 0, "record": record, "answers": answers}])
    sure = {"efficacy_score": 100.0, "es_first_token": 100.0, "exact_new": 100.0, "exact_true": 0.0}
    metrics = {name: Metric(value, 1, value, value) for name, value in sure.items()}
    margin = 100 * (2.718281828459045**-1 - 2.718281828459045**-2)
    metrics["efficacy_magnitude"] = Metric(margin, 1, margin, margin)
    return tmp_path, Result({"task": "fact"}, "efficacy_score", metrics, None, "", "", {}, None, 1.0, None)


def test_predictions_that_give_the_result(predicted):
    check_predictions(*predicted)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"exact_true": Metric(50.0, 1, 50.0, 50.0)}, "exact_true 50.00 .* in the result, 0.00 .* computed again"),
        ({"score": Metric(50.0, 1)}, "score 50.00 in the result, absent computed again"),
    ],
)
def test_a_result_of_other_predictions_is_found_out(predicted, change, message):
    folder, result = predicted
    with pytest.raises(ValueError, match=message):
        check_predictions(folder, dataclasses.replace(result, metrics=result.metrics | change))


def test_no_predictions(predicted):
    folder, result = predicted
    (folder / "predictions.jsonl.gz").unlink()
    with pytest.raises(MolfError, match="predictions.jsonl.gz"):
        check_predictions(folder, result)
