import dataclasses

import pytest
import torch

from forked import on_two_ranks
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


def test_metrics_do_not_depend_on_the_batches(tiny_model, tiny_tokenizer):
    rows = FACT.load(sample=True, limit=8).eval
    whole = evaluate(tiny_model, tiny_tokenizer, FACT, rows, batch_tokens=100_000).metrics
    assert 0 < whole["score"].value < 100
    for batch_tokens in (1, 300, 1200):
        found = evaluate(tiny_model, tiny_tokenizer, FACT, rows, batch_tokens=batch_tokens).metrics
        assert found.keys() == whole.keys()
        for name, metric in whole.items():
            if name.endswith("_magnitude"):  # not of counts, so that rounding shows
                assert dataclasses.astuple(found[name]) == pytest.approx(dataclasses.astuple(metric), abs=1e-4)
            else:
                assert found[name] == metric


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


@pytest.mark.parametrize("count", [1, 5])
def test_two_ranks_give_the_result_of_one_process(tiny_model, tiny_tokenizer, tmp_path, count):
    rows = FACT.load(sample=True, limit=count).eval
    asked = []

    class Counting(Fact):
        def requests(self, row):
            asked.append(row["case_id"])
            return super().requests(row)

    def on_rank(rank):
        evaluation = evaluate(tiny_model, tiny_tokenizer, Counting(), rows, batch_tokens=600, shard=True)
        return asked[: len(rows[rank::2])], evaluation

    torch.set_num_threads(1)  # threads do not survive a fork
    alone = evaluate(tiny_model, tiny_tokenizer, FACT, rows, shard=True)
    for rank, (first_asked, evaluation) in enumerate(on_two_ranks(on_rank, tmp_path)):
        assert first_asked == [row["case_id"] for row in rows[rank::2]]
        assert evaluation.metrics.keys() == alone.metrics.keys()
        for name, metric in alone.metrics.items():
            assert dataclasses.astuple(evaluation.metrics[name]) == pytest.approx(dataclasses.astuple(metric), abs=1e-4)
        for found, expected in zip(evaluation.predictions, alone.predictions, strict=True):
            assert found.keys() == expected.keys() and found["row"] == expected["row"]
            assert (found["record"], found["outcome"]) == (expected["record"], expected["outcome"])
            for one, other in zip(found["answers"], expected["answers"], strict=True):
                assert one.pop("logprobs", ()) == pytest.approx(other.get("logprobs", ()), abs=1e-5)
                assert one == {name: value for name, value in other.items() if name != "logprobs"}


def test_no_rows_is_an_error(tiny_model, tiny_tokenizer):
    with pytest.raises(ValueError, match="no rows to evaluate the task 'fact' on"):
        evaluate(tiny_model, tiny_tokenizer, FACT, [])
