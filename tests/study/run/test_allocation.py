from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molf.study.run.allocation import (
    Evidence,
    Layer,
    allocate,
    by_kind,
    evidence_of,
    ranks_within,
    shuffled,
)

SHAPES = {"q_proj": (16, 16), "k_proj": (16, 8), "up_proj": (16, 48)}


def layer(inputs, out):
    return Layer(inputs * out, inputs + out, inputs * out // (inputs + out))


LAYERS = {f"{depth}.{kind}": layer(*shape) for depth in range(4) for kind, shape in SHAPES.items()}
EVIDENCE = {
    name: Evidence((depth + 1) / 4 if kind == "k_proj" else 0.1 * depth, 2.0 + depth)
    for name in LAYERS
    for depth, kind in [(int(name[0]), name[2:])]
}
TOTAL = sum(own.whole for own in LAYERS.values())


def within(found, layers, budget):
    """Check that a budget is used up to less than the cheapest rank that could still be added."""
    left = budget - found.cost(layers)
    open_to_more = [
        own.per_rank for name, own in layers.items() if name not in found.whole and found.ranks.get(name, 0) < own.most
    ]
    assert 0 <= left < min(open_to_more, default=float("inf"))
    assert not set(found.whole) & found.ranks.keys()
    assert all(1 <= rank <= layers[name].most for name, rank in found.ranks.items())


@settings(deadline=None, max_examples=60)
@given(
    budget=st.integers(100, TOTAL),
    shares=st.lists(st.tuples(st.floats(0, 1), st.floats(1, 128)), min_size=12, max_size=12),
    draw=st.integers(0, 99),
)
def test_every_rule_uses_up_the_same_budget_and_no_more(budget, shares, draw):
    evidence = {name: Evidence(*own) for name, own in zip(LAYERS, shares, strict=True)}
    for own in (evidence, shuffled(evidence, draw), by_kind(evidence)):
        within(allocate(own, LAYERS, budget, draw), LAYERS, budget)
    for weights in (dict.fromkeys(LAYERS, 1.0), {name: own.rank for name, own in evidence.items()}):
        ranks = ranks_within(weights, LAYERS, budget)
        assert sum(LAYERS[name].per_rank * rank for name, rank in ranks.items()) <= budget
        assert all(rank <= LAYERS[name].most for name, rank in ranks.items())


def test_layers_where_full_fine_tuning_won_train_whole():
    budget = TOTAL // 4
    found = allocate(EVIDENCE, LAYERS, budget)
    mean = sum(own.fft for own in EVIDENCE.values()) / len(EVIDENCE)
    assert found.whole == ("2.k_proj", "3.k_proj"), "in the order of the model; a third one costs too much"
    assert sum(LAYERS[name].whole for name in found.whole) <= budget * mean
    assert all(EVIDENCE[name].fft >= mean for name in found.whole)
    assert found.ranks["3.q_proj"] > found.ranks["0.q_proj"], "the mean rank that won"


def test_without_full_fine_tuning_all_is_lora():
    lora = {name: Evidence(0.0, own.rank) for name, own in EVIDENCE.items()}
    assert allocate(lora, LAYERS, TOTAL // 4).whole == ()


def test_one_rank_for_all_layers_as_nearly_as_the_budget_goes():
    costs = sum(own.per_rank for own in LAYERS.values())
    assert set(ranks_within(dict.fromkeys(LAYERS, 1.0), LAYERS, 3 * costs).values()) == {3}
    more = ranks_within(dict.fromkeys(LAYERS, 1.0), LAYERS, 3 * costs + 24)
    assert Counter(more.values()) == {3: 11, 4: 1}


def test_a_stack_trains_whole_or_not_at_all():
    layers = LAYERS | {"experts.up": Layer(64, 0, 0)}
    evidence = EVIDENCE | {"experts.up": Evidence(1.0, 4.0)}
    assert "experts.up" in allocate(evidence, layers, TOTAL).whole
    small = allocate(evidence, layers, 100)
    assert "experts.up" not in small.whole and "experts.up" not in small.ranks


@pytest.mark.parametrize("budget", [0, 23])
def test_a_budget_below_one_rank_is_refused(budget):
    with pytest.raises(ValueError, match=f"a budget of {budget} parameters is too small"):
        allocate({name: Evidence(0.0, 1.0) for name in LAYERS}, LAYERS, budget)


def test_draws_differ_and_can_be_repeated():
    draws = [allocate(shuffled(EVIDENCE, draw), LAYERS, TOTAL // 4, draw) for draw in (0, 1, 2, 0)]
    assert draws[0] == draws[3] and len({str(draw) for draw in draws}) == 3
    assert sorted(str(own) for own in shuffled(EVIDENCE, 1).values()) == sorted(map(str, EVIDENCE.values()))


def test_the_mean_of_a_kind():
    found = by_kind(EVIDENCE)
    assert {own for name, own in found.items() if name.endswith("k_proj")} == {Evidence(0.625, 3.5)}


def test_evidence_from_shares():
    by_module = {
        "a.q": {"fft": 0.5, "lora_r8": 0.25, "lora_r32": 0.25},
        "a.up[0]": {"fft": 1.0, "lora_r8": 0.0, "lora_r32": 0.0},
        "a.up[1]": {"fft": 0.0, "lora_r8": 1.0, "lora_r32": 0.0},
    }
    assert evidence_of(by_module) == {"a.q": Evidence(0.5, 26.0), "a.up": Evidence(0.5, 20.0)}
    assert evidence_of({"a": {"lora_r2": 1.0, "lora_r4": 1.0}}) == {"a": Evidence(0.0, 3.0)}, "of two winners"


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ({"fft": 0.5, "mine": 0.5}, "an expert 'mine': a recipe is made from fft"),
        ({"fft": 0.0, "lora_r2": 0.0}, "no expert won in b"),
    ],
)
def test_evidence_that_is_none_is_refused(shares, words):
    with pytest.raises(ValueError, match=words):
        evidence_of({"a": dict(shares, fft=1.0), "b": shares})
