import math
from dataclasses import replace

import pytest
import torch

from molf.scores import EPD, PFN, SCORES, Evidence, Random, Score, _keys, get_score

EPS = 1e-3


@pytest.fixture
def moments():
    return torch.randn(6, 7, dtype=torch.float64), torch.rand(6, 7, dtype=torch.float64)


def by_hand(name, m, v, lr):
    """The two equations, element by element."""
    m, v = m.flatten().tolist(), v.flatten().tolist()
    if name == "epd":
        return lr / len(m) * sum(a * a / (math.sqrt(b) + EPS) for a, b in zip(m, v, strict=True))
    return math.sqrt(sum((a / (math.sqrt(b) + EPS)) ** 2 for a, b in zip(m, v, strict=True)) / len(m))


@pytest.mark.parametrize("name", ["epd", "pfn"])
def test_score_is_its_equation(name, moments):
    m, v = moments
    score, n = get_score(name), torch.tensor([[m.numel()]])
    lr = torch.tensor([[0.5]], dtype=torch.float64)
    got = score.finish(score.term(m, v, EPS).sum().view(1, 1), n, lr)
    assert got.item() == pytest.approx(by_hand(name, m, v, 0.5), rel=1e-14)


@pytest.mark.parametrize("score", [EPD(), PFN()], ids=lambda s: s.name)
def test_partial_is_the_sum_of_terms(score, moments):
    m, v = (x.flatten() for x in moments)
    u = m / (v.sqrt() + EPS)
    assert score.partial(m, v, u, EPS).item() == pytest.approx(score.term(m, v, EPS).sum().item(), rel=1e-14)
    pieces = [score.partial(m[i : i + 10], v[i : i + 10], u[i : i + 10], EPS) for i in range(0, len(m), 10)]
    assert sum(pieces).item() == pytest.approx(score.partial(m, v, u, EPS).item(), rel=1e-14)


@pytest.mark.parametrize("score", [EPD(), PFN()], ids=lambda s: s.name)
def test_no_gradient_scores_zero(score):
    m, v = torch.zeros(4), torch.zeros(4)
    total = score.term(m, v, 1e-8).sum().view(1, 1)
    assert score.finish(total, torch.tensor([[4.0]]), torch.tensor([[1.0]])).item() == 0.0


def test_only_epd_follows_size_and_rate(moments):
    m, v = moments
    n, lr = torch.tensor([[42.0]]), torch.tensor([[1e-3]])

    def scored(score, c, lr):
        return score.finish(score.term(c * m, c * c * v, 0.0).sum().view(1, 1), n, lr).item()

    assert scored(PFN(), 10.0, 7 * lr) == pytest.approx(scored(PFN(), 1.0, lr))
    assert scored(EPD(), 10.0, 7 * lr) == pytest.approx(70 * scored(EPD(), 1.0, lr))


def test_own_score_needs_term_and_finish_only():
    class MeanMoment(Score):
        name = "mean_moment"

        def term(self, m, v, eps):
            return m.abs()

        def finish(self, total, n, lr):
            return total / n

    score = MeanMoment()
    assert get_score(score) is score
    m = torch.tensor([1.0, -3.0])
    assert score.partial(m, m, m, 1e-8).item() == 4.0


def test_names_lead_to_scores():
    assert {name: get_score(name).name for name in SCORES} == {
        name: name for name in ("epd", "pfn", "descent", "random", "coherence", "shuffled")
    }


def evidence(modules, steps, experts=2):
    ones = torch.ones(len(modules), experts, dtype=torch.float64)
    return Evidence(tuple(modules), ones, ones, ones, ones, torch.tensor(steps, dtype=torch.float64))


def test_random_scores_depend_on_seed_module_and_step_alone():
    scores = Random().scores(evidence(["a", "b"], [1, 1]))
    assert torch.equal(scores[1:], Random().scores(evidence(["b"], [1])))
    others = [Random().scores(evidence(["a"], [2])), Random(1).scores(evidence(["a"], [1])), scores[1:]]
    assert all(not torch.equal(other, scores[:1]) for other in others)


def test_modules_that_are_scored_one_by_one_are_hashed_once():
    """As in backward: hashing again would copy to the device at every step."""
    _keys.cache_clear()
    for t in range(2):
        for i in range(500):
            Random().scores(evidence([str(i)], [t]))
    assert _keys.cache_info().misses == 500


def test_random_routing_gives_every_expert_its_share():
    scores = Random().scores(evidence([str(i) for i in range(3000)], [7] * 3000, experts=3))
    shares = torch.bincount(scores.argmax(1), minlength=3) / 3000
    assert (shares - 1 / 3).abs().max() < 0.03


def test_shuffled_deals_the_scores_of_epd_to_other_modules():
    total = torch.rand(50, 3, dtype=torch.float64)

    def shuffled(t):
        return SCORES["shuffled"].scores(
            replace(evidence([str(i) for i in range(50)], [t] * 50, experts=3), total=total)
        )

    assert sorted(shuffled(1).tolist()) == sorted(total.tolist())
    assert torch.equal(shuffled(1), shuffled(1))
    kept = (shuffled(1) == total).all(1)
    assert kept.sum() < 10 and not torch.equal(shuffled(1), shuffled(2))


def test_coherence_is_zero_where_no_square_of_a_gradient_is_left():
    """As with gradients of 1e-23 in float32, or a second beta of 0 where the gradient is zero now."""
    nothing = replace(evidence(["a"], [1]), total=torch.zeros(1, 2, dtype=torch.float64))
    assert SCORES["coherence"].scores(nothing).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ("edp", ValueError, "unknown score 'edp'.*'epd', 'pfn'.*did you mean 'epd'"),
        ("zzzzzz", ValueError, r"unknown score 'zzzzzz'.*of your own$"),
        (None, TypeError, "got NoneType"),
        (EPD, TypeError, "molf.Score"),
    ],
)
def test_unknown_score(given, error, words):
    with pytest.raises(error, match=words):
        get_score(given)
