import pytest
import torch

from molf.routing import Routing, choose

SCORES = torch.tensor([[1.0, 3.0, 2.0], [5.0, 4.0, 6.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("top_k", "expected"),
    [
        (1, [[False, True, False], [False, False, True]]),
        (2, [[False, True, True], [True, False, True]]),
        (3, [[True, True, True], [True, True, True]]),
    ],
)
def test_best_experts_are_chosen(top_k, expected):
    assert choose(SCORES, top_k).tolist() == expected


@pytest.mark.parametrize(
    ("row", "top_k", "expected"),
    [
        ([0.0, 0.0, 0.0], 1, [True, False, False]),
        ([0.0, 0.0, 0.0], 2, [True, True, False]),
        ([1.0, 2.0, 2.0], 1, [False, True, False]),
        ([2.0, 1.0, 2.0, 2.0], 2, [True, False, True, False]),
        ([0.0, -0.0], 1, [True, False]),
        ([-0.0, 0.0], 1, [True, False]),
    ],
)
def test_ties_go_to_the_earlier_expert(row, top_k, expected):
    assert choose(torch.tensor([row], dtype=torch.float64), top_k).tolist() == [expected]


def test_ties_hold_for_many_experts():
    """A sort that is not stable shows itself only on longer rows."""
    chosen = choose(torch.zeros(3, 100), 7)
    assert chosen[:, :7].all() and not chosen[:, 7:].any()


@pytest.fixture
def routing():
    return Routing(("a", "b"), ("fft", "lora_r2", "lora_r4"), SCORES, choose(SCORES, 2))


def test_winners_best_first(routing):
    assert routing.winners() == {"a": ["lora_r2", "lora_r4"], "b": ["lora_r4", "fft"]}


def test_an_expert_without_a_score_is_the_last_of_the_winners():
    scores = torch.tensor([[torch.nan, 1.0, 2.0]], dtype=torch.float64)
    routing = Routing(("a",), ("fft", "lora_r2", "lora_r4"), scores, choose(scores, 3))
    assert routing.winners() == {"a": ["lora_r4", "lora_r2", "fft"]}


def test_share_counts_wins(routing):
    assert routing.share("lora_r4") == 0.5
    assert routing.share("fft") == routing.share("lora_r2") == 0.25


def test_share_of_an_unknown_expert(routing):
    with pytest.raises(ValueError, match=r"no expert 'lora_r3' here.*'lora_r4'"):
        routing.share("lora_r3")
