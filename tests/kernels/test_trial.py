import pytest
import torch

from fused import DEVICE
from kinds import branched, even, kind
from molf.kernels import products
from molf.kernels import step as kernels
from molf.kernels import trial as trials
from molf.kernels.trial import trial


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.bfloat16, "score": "pfn", "ranks": (2, 4)},
        {"dtype": torch.bfloat16, "bf16_update": "stochastic", "optim_bits": 8},
        {"make": even, "optim_bits": 8, "ranks": (16,)},
        {"make": branched, "ranks": None},
    ],
)
def test_the_kernels_take_the_step_of_pytorchs(options):
    tried, before = kind(**options), torch.random.get_rng_state()
    assert trial(tried) is None
    assert torch.random.get_rng_state().equal(before), "a random number of the user's was drawn"


def test_a_trial_is_the_same_under_autocast_and_with_gradients():
    with torch.enable_grad(), torch.autocast(DEVICE, torch.bfloat16):
        assert trial(kind(make=even, ranks=(16,))) is None


def test_rounding_to_tf32_passes_by_far(monkeypatch):
    """As on tensor cores: with a fifth of what is allowed."""
    monkeypatch.setattr(products, "cuts_factors", lambda device: True)
    monkeypatch.setattr(trials, "_ALLOWED", trials._ALLOWED / 5)
    assert trial(kind(make=even, ranks=(16,))) is None


@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        ("move_moments_", lambda args: args[0][0].exp_avg.view(-1)[0].add_(1.0), "exp_avg of a parameter"),
        (
            "move_winners_",
            lambda args: args[1] and args[1][-1].param.view(-1)[0].add_(1.0),
            r"lora_r16\.[AB] of a parameter",
        ),
        ("fold_winners_", lambda args: args[0][0].weight.view(-1)[0].add_(1.0), "the value of a parameter"),
        ("pair_gradients", lambda args: args[0][0].dB.mul_(1.5), "a score"),
    ],
)
def test_a_wrong_kernel_is_found(name, spoil, words, monkeypatch):
    right = getattr(kernels, name)

    def wrong(*args):
        result = right(*args)
        spoil(args)
        return result

    monkeypatch.setattr(kernels, name, wrong)
    with pytest.raises(AssertionError, match=rf"({words}).*: off by .*, where .* is allowed, at step \d of a trial"):
        assert trial(kind(make=even, ranks=(16,))) is None


def test_a_wrong_decision_is_found(monkeypatch):
    right = kernels.choose
    monkeypatch.setattr(kernels, "choose", lambda scores, top_k: right(-scores, top_k))
    assert "the share of other winners: off by 1" in trial(kind(make=even, ranks=(16,)))
