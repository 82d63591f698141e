from types import SimpleNamespace

import pytest

from molf.tasks import TASKS, get_task
from molf.tasks.base import NextToken, OptionScores, TargetScores, less_is_better


def test_a_task_is_found_by_its_own_name():
    headlines = {"fact": "efficacy_score", "med": "accuracy", "sql": "exact_match", "custom": "token_accuracy"}
    assert {get_task(name).name: get_task(name).headline for name in TASKS} == headlines


def test_an_unknown_name_says_what_there_is():
    with pytest.raises(
        ValueError, match=r"unknown task 'facts' \(did you mean 'fact'\?\); the tasks are: fact, med, sql, custom"
    ):
        get_task("facts")
    with pytest.raises(ValueError, match="unknown task 'zzz'; the tasks are: fact, med, sql, custom"):
        get_task("zzz")


@pytest.mark.parametrize(
    ("task", "metric", "less"),
    [
        ("custom", "loss", True),
        ("custom", "perplexity", True),
        ("custom", "token_accuracy", False),
        ("med", "accuracy/Anatomy", False),
        ("med", "invalid_answers", True),
        ("sql", "unusable_gold", True),
        ("fact", "exact_true", True),
    ],
)
def test_a_task_says_which_value_of_a_metric_is_better(task, metric, less):
    assert less_is_better(get_task(task), metric) is less


def test_a_task_that_declares_no_metrics_has_its_headline():
    task = SimpleNamespace(name="own", headline="blue")
    assert less_is_better(task, "blue") is False
    with pytest.raises(
        ValueError, match='only blue; choose one of these, or declare it in the task: metrics = {"red": "more"}'
    ):
        less_is_better(task, "red")


def test_probability_is_the_geometric_mean():
    scores = TargetScores(logprobs=(-1.0, -3.0), token_ids=(5, 6), greedy=(True, False))
    assert scores.mean_logprob == -2.0
    assert scores.probability == pytest.approx(0.1353352832366127)


def test_the_best_option_is_the_first_of_the_most_likely():
    assert OptionScores((-3.0, -1.0, -2.0), (7, 8, 9)).best == 1
    assert OptionScores((-3.0, -1.0, -1.0), (7, 8, 9)).best == 1


@pytest.mark.parametrize("options", [(), (" A",), (" A", " B", " A")])
def test_a_choice_is_between_different_options(options):
    with pytest.raises(ValueError, match="must be two or more different texts"):
        NextToken("The answer is", options)
