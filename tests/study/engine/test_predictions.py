import datetime
import gzip
import json

import pytest

from molf.errors import MolfError
from molf.study.engine.evaluate import evaluate
from molf.study.engine.predictions import rescored, write_predictions
from molf.tasks import Generate, Likelihood, NextToken
from molf.tasks.fact import Fact
from molf.tasks.metrics import percentage

FACT = Fact()


class Colours:
    """A task with all three kinds of requests, and with a record that JSON cannot hold as it is."""

    name, headline = "colours", "blue"

    def requests(self, row):
        return [NextToken(row["prompt"], ("A", "B")), Likelihood(row["prompt"], " king"), Generate(row["prompt"], 3)]

    def score(self, rows, answers):
        return {
            "first": percentage([choice.best == 0 for choice, _, _ in answers]),
            "greedy": percentage([all(scores.greedy) for _, scores, _ in answers]),
            "spoken": percentage([bool(text.strip()) for _, _, text in answers]),
        }


@pytest.fixture
def rows():
    return FACT.load(sample=True, limit=6).eval


def read(path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_metrics_computed_from_the_file_are_those_reported(tiny_model, tiny_tokenizer, rows, tmp_path):
    evaluation = evaluate(tiny_model, tiny_tokenizer, FACT, rows)
    path = tmp_path / "predictions.jsonl.gz"
    write_predictions(path, evaluation.predictions)
    assert rescored(path, FACT) == evaluation.metrics
    changed = read(path)
    for prediction in changed:
        prediction["answers"][0]["logprobs"] = [-1e-3] * len(prediction["answers"][0]["logprobs"])
    write_predictions(path, changed)
    assert rescored(path, FACT)["efficacy_score"].value == 100 > evaluation.metrics["efficacy_score"].value


def test_every_kind_of_answer_survives_the_file(tiny_model, tiny_tokenizer, tmp_path):
    asked = [{"prompt": word, "day": datetime.date(2020, 1, 1)} for word in ("The", "SELECT", "Paris is", "age")]
    evaluation = evaluate(tiny_model, tiny_tokenizer, Colours(), asked)
    write_predictions(tmp_path / "p.jsonl.gz", evaluation.predictions)
    assert rescored(tmp_path / "p.jsonl.gz", Colours()) == evaluation.metrics
    first = read(tmp_path / "p.jsonl.gz")[0]
    assert first["record"] == {"prompt": "The", "day": "2020-01-01"}
    choice, likelihood, generation = first["answers"]
    assert choice["options"] == ["A", "B"] and len(choice["logprobs"]) == 2
    assert likelihood["target"] == " king" and generation["max_new_tokens"] == 3
    assert "outcome" not in first


def test_every_row_is_told_by_its_number_record_and_outcome(tiny_model, tiny_tokenizer, rows):
    evaluation = evaluate(tiny_model, tiny_tokenizer, FACT, rows)
    for number, (row, prediction) in enumerate(zip(rows, evaluation.predictions, strict=True)):
        assert (prediction["row"], prediction["record"]) == (number, row)
    for name in ("efficacy_score", "neighborhood_score"):
        values = [prediction["outcome"][name] for prediction in evaluation.predictions]
        assert sum(values) / len(values) == pytest.approx(evaluation.metrics[name].value)


def test_what_holds_no_predictions_is_refused(tmp_path):
    write_predictions(tmp_path / "p.jsonl.gz", [{"row": 0, "answers": []}])
    with pytest.raises(ValueError, match="p.jsonl.gz, line 1: no field 'record'"):
        rescored(tmp_path / "p.jsonl.gz", FACT)


def test_predictions_are_written_whole_and_alike(tmp_path):
    predictions = [{"row": 0, "answers": [{"text": "東京"}]}, {"row": 1, "answers": []}]
    one, other = tmp_path / "one.jsonl.gz", tmp_path / "other.jsonl.gz"
    write_predictions(one, predictions)
    write_predictions(other, predictions)
    assert one.read_bytes() == other.read_bytes()
    with gzip.open(one, "rt", encoding="utf-8") as file:
        assert [json.loads(line) for line in file] == predictions
    with pytest.raises(TypeError):
        write_predictions(one, [{"row": 0}, {"row": object()}])
    assert one.read_bytes() == other.read_bytes()
    assert sorted(tmp_path.iterdir()) == [one, other]


@pytest.mark.parametrize("damage", [{"record": {}}, {"answers": []}, {"answers": [{}]}, {"answers": [5]}], ids=str)
def test_a_damaged_prediction_is_an_error_that_says_what_to_do(damage, tiny_model, tiny_tokenizer, rows, tmp_path):
    path = tmp_path / "p.jsonl.gz"
    predictions = evaluate(tiny_model, tiny_tokenizer, FACT, rows[:1]).predictions
    write_predictions(path, [predictions[0] | damage])
    with pytest.raises(MolfError, match=f"{path}.*: not a prediction of this version of molf: .*`molf eval`"):
        rescored(path, FACT)
