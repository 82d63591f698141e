import json
import math
import re
from collections import Counter

import pytest

from molf.tasks import Generate, Likelihood, Metric, TargetScores
from molf.tasks.fact import Fact, edit_prompt

FACT = Fact()


def make_row(case_id=0, prompt="The capital of {} is", subject="France", new="Rome", true="Paris", para=(), near=()):
    return {
        "case_id": case_id,
        "requested_rewrite": {
            "prompt": prompt, "subject": subject, "target_new": {"str": new}, "target_true": {"str": true},
        },
        "paraphrase_prompts": list(para),
        "neighborhood_prompts": list(near),
    }  # fmt: skip


def prob(*probabilities, ids=None):
    """The scores of a target whose tokens have these probabilities."""
    ids = tuple(ids or range(len(probabilities)))
    return TargetScores(tuple(map(math.log, probabilities)), ids, (False,) * len(ids))


def pair(new, true):
    """The answers about a prompt after which the one-token targets have these probabilities."""
    return [prob(new, ids=[1]), prob(true, ids=[2])]


def write(tmp_path, rows):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    return str(path)


# --- loading ---


@pytest.fixture(scope="module")
def sample():
    return FACT.load(sample=True)


def test_the_packaged_slice_is_what_its_readme_says(sample):
    rows = sample.eval
    assert len(rows) == 1000 and sample.train == rows
    assert "counterfact_sample" in sample.origin
    ids = [row["case_id"] for row in rows]
    assert ids == sorted(set(ids)) and (ids[0], ids[-1]) == (0, 1077)
    assert {(len(row["paraphrase_prompts"]), len(row["neighborhood_prompts"])) for row in rows} == {(2, 10)}
    assert all(row["pararel_idx"] is not None for row in rows)
    assert len({row["requested_rewrite"]["relation_id"] for row in rows}) == 34
    assert max(Counter(map(edit_prompt, rows)).values()) == 1


def test_limit_takes_the_first_rows_whatever_the_seed(sample):
    for seed in (0, 7):
        assert FACT.load(sample=True, limit=200, seed=seed).eval == sample.eval[:200]
    assert len(FACT.load(sample=True, limit=5000).eval) == 1000


def test_the_published_file_is_looked_for_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOLF_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConnectionError, match="rome.baulab.info.*--data_path PATH.*--sample"):
        FACT.load()
    (tmp_path / "fact").mkdir()
    (tmp_path / "fact" / "counterfact.json").write_text(json.dumps([make_row(9)]))
    split = FACT.load()
    assert [row["case_id"] for row in split.eval] == [9]
    assert re.fullmatch(r"https://rome.baulab.info/\S+ \(sha256 [0-9a-f]{64}\)", split.origin)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompt": "The capital is"}, "case_id 5: the prompt must contain {}, the subject's place, exactly once"),
        ({"prompt": "{} and {}"}, "case_id 5: the prompt must contain {}, the subject's place, exactly once"),
        ({"new": " "}, "case_id 5: target_new is empty"),
        ({"true": ""}, "case_id 5: target_true is empty"),
        ({"para": [3]}, "case_id 5: paraphrase_prompts must be a list of non-empty strings"),
        ({"near": [" "]}, "case_id 5: neighborhood_prompts must be a list of non-empty strings"),
    ],
)
def test_bad_records_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=f"record 2: {message}"):
        FACT.load(write(tmp_path, [make_row(4), make_row(5, **change)]))


# --- training and asking ---


def test_example_is_prompt_and_new_answer():
    row = make_row(prompt="{} speaks {x} ", subject="A {b} {}")
    assert FACT.example(row) == {"prompt": "A {b} {} speaks {x}", "completion": " Rome"}


def test_every_prompt_is_asked_for_both_targets():
    row = make_row(para=["P "], near=["N1", "N2"])
    prompts = ["The capital of France is", "P", "N1", "N2"]
    likelihoods = [Likelihood(prompt, target) for prompt in prompts for target in (" Rome", " Paris")]
    assert FACT.requests(row) == [*likelihoods, Generate("The capital of France is", 16)]


# --- scoring ---


def test_metrics_worked_out_by_hand():
    rows = [make_row(0, para=["p", "q"], near=["n", "m"]), make_row(1, para=["p"])]
    answers = [
        [*pair(0.5, 0.25), *pair(0.5, 0.1), *pair(0.1, 0.2), *pair(0.1, 0.3), *pair(0.4, 0.2), " Rome\n"],
        [*pair(0.1, 0.2), *pair(0.6, 0.1), "Paris"],
    ]
    expected = {
        "efficacy_score": (50, 2),
        "efficacy_magnitude": (100 * (0.25 - 0.1) / 2, 2),
        "paraphrase_score": (100 * (0.5 + 1) / 2, 2),  # not 2 of 3: records count equally
        "paraphrase_magnitude": (100 * ((0.4 - 0.1) / 2 + 0.5) / 2, 2),
        "neighborhood_score": (50, 1),  # the second record has no such prompts
        "neighborhood_magnitude": (100 * (0.2 - 0.2) / 2, 1),
        "score": (3 / (1 / 50 + 1 / 75 + 1 / 50), 1),
        "es_first_token": (50, 2),
        "exact_new": (50, 2),
        "exact_true": (50, 2),
    }
    metrics = FACT.score(rows, answers)
    assert metrics.keys() == expected.keys() == FACT.metrics.keys()
    assert FACT.headline in metrics
    for name, (value, n) in expected.items():
        assert metrics[name].value == pytest.approx(value, abs=1e-9), name
        assert metrics[name].n == n, name
        assert metrics[name].low <= metrics[name].value + 1e-9, name
        assert metrics[name].high >= metrics[name].value - 1e-9, name


def test_the_interval_of_the_harmonic_mean_resamples_whole_records():
    row = make_row(para=["p"], near=["n"])
    all_right = [*pair(0.9, 0.1), *pair(0.9, 0.1), *pair(0.1, 0.9), ""]
    all_wrong = [*pair(0.1, 0.9), *pair(0.1, 0.9), *pair(0.9, 0.1), ""]
    metrics = FACT.score([row] * 40, [all_right, all_wrong] * 20)
    # The three scores rise and fall together, so that their harmonic mean is as uncertain as each of them.
    assert metrics["score"].value == pytest.approx(50)
    for end in ("low", "high"):
        assert getattr(metrics["score"], end) == pytest.approx(getattr(metrics["efficacy_score"], end))
    assert 30 < metrics["score"].low < 40 and 60 < metrics["score"].high < 70


def test_records_without_some_prompts_count_for_the_other_scores_only():
    rows = [make_row(0, para=["p"], near=["n"]), make_row(1, para=["p"])]
    right, wrong = pair(0.9, 0.1), pair(0.1, 0.9)
    metrics = FACT.score(rows, [[*right, *right, *wrong, ""], [*wrong, *right, ""]])
    assert metrics["score"].value == pytest.approx(3 / (1 / 50 + 2 / 100))
    assert metrics["score"].n == 1
    apart = FACT.score([make_row(0, para=["p"]), make_row(1, near=["n"])], [[*right, *right, ""], [*right, *wrong, ""]])
    assert (apart["score"].value, apart["score"].n) == (pytest.approx(100), 1)


def test_whole_target_and_first_token_can_disagree():
    answers = [prob(0.5, 0.01, ids=[1, 2]), prob(0.4, ids=[3]), ""]
    metrics = FACT.score([make_row()], [answers])
    assert metrics["efficacy_score"].value == 0
    assert metrics["efficacy_magnitude"].value == pytest.approx(100 * (math.sqrt(0.005) - 0.4))
    assert metrics["es_first_token"].value == 100


def test_targets_with_one_first_token_are_left_out_and_seen_in_n():
    shared = [prob(0.5, 0.5, ids=[1, 2]), prob(0.5, 0.1, ids=[1, 3]), ""]
    metrics = FACT.score([make_row(0), make_row(1)], [shared, [*pair(0.1, 0.9), ""]])
    assert metrics["es_first_token"] == Metric(0, 1, 0, 0)
    assert metrics["efficacy_score"] == Metric(50, 2, 0, 100)
    assert "es_first_token" not in FACT.score([make_row()], [shared])


def test_metrics_without_prompts_are_absent():
    metrics = FACT.score([make_row()], [[*pair(0.9, 0.1), "x"]])
    assert sorted(metrics) == ["efficacy_magnitude", "efficacy_score", "es_first_token", "exact_new", "exact_true"]
    assert FACT.score([], []) == {}


def test_a_tie_is_no_success_and_one_zero_makes_the_score_zero():
    row = make_row(para=["p"], near=["n"])
    metrics = FACT.score([row], [[*pair(0.3, 0.3), *pair(0.9, 0.1), *pair(0.1, 0.9), ""]])
    assert metrics["efficacy_score"].value == 0
    assert metrics["score"] == Metric(0, 1, 0, 0)


def test_targets_too_unlikely_for_a_float_are_still_compared():
    answers = [TargetScores((-1000.0,), (1,), (False,)), TargetScores((-2000.0,), (2,), (False,)), ""]
    assert FACT.score([make_row()], [answers])["efficacy_score"].value == 100


@pytest.mark.parametrize("swapped", [False, True])
def test_perfect_and_worst_answers_on_the_packaged_slice(sample, swapped):
    def perfect(row):
        edits = [prob(0.9, ids=[1]), prob(0.1, ids=[2])] * 3
        neighbors = [prob(0.1, ids=[1]), prob(0.9, ids=[2])] * 10
        answers = [*edits, *neighbors, FACT.example(row)["completion"]]
        if swapped:
            answers[:-1] = [answers[i ^ 1] for i in range(len(answers) - 1)]
            answers[-1] = row["requested_rewrite"]["target_true"]["str"]
        return answers

    metrics = FACT.score(sample.eval, [perfect(row) for row in sample.eval])
    best = ("efficacy_score", "paraphrase_score", "neighborhood_score", "score", "exact_new")
    assert {name: metrics[name].value for name in best} == dict.fromkeys(best, 0 if swapped else 100)
    assert metrics["exact_true"].value == (100 if swapped else 0)
    assert metrics["efficacy_magnitude"].value == pytest.approx(-80 if swapped else 80)
    assert {metric.n for name, metric in metrics.items() if name != "es_first_token"} == {1000}
