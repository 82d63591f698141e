import dataclasses

import pytest

from molf.study.engine.evaluate import evaluate
from molf.study.engine.inference import answer
from molf.tasks.fact import Fact

FACT = Fact()


@pytest.fixture(scope="module")
def rows():
    return FACT.load(sample=True, limit=3).eval


def test_metrics_are_the_tasks_own_of_the_engines_answers(tiny_model, tiny_tokenizer, rows):
    evaluation = evaluate(tiny_model, tiny_tokenizer, FACT, rows)
    answers = [answer(tiny_model, tiny_tokenizer, FACT.requests(row)) for row in rows]
    expected = FACT.score(rows, answers)
    assert evaluation.metrics.keys() == expected.keys()
    for name, metric in expected.items():
        assert evaluation.metrics[name].value == pytest.approx(metric.value, abs=1e-3)
        assert evaluation.metrics[name].n == metric.n


@pytest.mark.parametrize("batch_tokens", [1, 300, 1200])
def test_metrics_do_not_depend_on_the_batches(tiny_model, tiny_tokenizer, batch_tokens):
    rows = FACT.load(sample=True, limit=12).eval
    whole = evaluate(tiny_model, tiny_tokenizer, FACT, rows, batch_tokens=100_000).metrics
    found = evaluate(tiny_model, tiny_tokenizer, FACT, rows, batch_tokens=batch_tokens).metrics
    assert found.keys() == whole.keys()
    for name, metric in whole.items():
        if name.endswith("_magnitude"):  # not of counts, so that rounding shows
            assert dataclasses.astuple(found[name]) == pytest.approx(dataclasses.astuple(metric), abs=1e-4)
        else:
            assert found[name] == metric
    assert 0 < whole["score"].value < 100


def test_a_number_can_be_traced_to_its_predictions(tiny_model, tiny_tokenizer, rows):
    evaluation = evaluate(tiny_model, tiny_tokenizer, FACT, rows)
    assert [prediction["row"] for prediction in evaluation.predictions] == [0, 1, 2]
    wins = 0
    for row, prediction in zip(rows, evaluation.predictions, strict=True):
        new, true, *_, generated = prediction["answers"]
        assert new["prompt"] == generated["prompt"] == FACT.example(row)["prompt"]
        assert new["target"] == FACT.example(row)["completion"]
        assert len(new["logprobs"]) == len(new["token_ids"])
        assert isinstance(generated["text"], str)
        wins += sum(new["logprobs"]) / len(new["logprobs"]) > sum(true["logprobs"]) / len(true["logprobs"])
    assert evaluation.metrics["efficacy_score"].value == pytest.approx(100 * wins / 3)


def test_no_rows_is_an_error(tiny_model, tiny_tokenizer):
    with pytest.raises(ValueError, match="no rows to evaluate the task 'fact' on"):
        evaluate(tiny_model, tiny_tokenizer, FACT, [])
