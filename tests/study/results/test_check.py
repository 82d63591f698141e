import dataclasses

import pytest

from molf.study.engine.predictions import write_predictions
from molf.study.results.check import check_predictions
from molf.study.results.result import Result
from molf.tasks import Metric


@pytest.fixture
def run(tmp_path):
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


def test_predictions_that_give_the_result(run):
    check_predictions(*run)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"exact_true": Metric(50.0, 1, 50.0, 50.0)}, "exact_true 50.00 .* in the result, 0.00 .* computed anew"),
        ({"score": Metric(50.0, 1)}, "score 50.00 in the result, absent computed anew"),
    ],
)
def test_a_result_of_other_predictions_is_found_out(run, change, message):
    folder, result = run
    with pytest.raises(ValueError, match=message):
        check_predictions(folder, dataclasses.replace(result, metrics=result.metrics | change))


def test_no_predictions(run):
    folder, result = run
    (folder / "predictions.jsonl.gz").unlink()
    with pytest.raises(FileNotFoundError, match="predictions.jsonl.gz"):
        check_predictions(folder, result)
