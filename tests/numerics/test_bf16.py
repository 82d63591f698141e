import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from conftest import TOLERANCE
from molf import MoLF
from molf.numerics.bf16 import join, split, stochastic_round
from small import mlp, train, wide

LARGEST_BELOW_OVERFLOW = 0x7F7F7FFF  # the largest float32 that still rounds to a finite bf16


def floats(*bits, negative=False):
    return torch.tensor([b - (1 << 31) if negative else b for b in bits], dtype=torch.int32).view(torch.float32)


def same_bits(x, y):
    return torch.equal(x.view(torch.int32), y.view(torch.int32))


# Zero, one, ties and their neighbours, rounding into the next exponent, subnormals, the largest ones, infinity.
SPECIAL = [0, 0x3F800000, 0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x3FFFFFFF]
SPECIAL += [1, 0x8000, 0x7FFFFF, LARGEST_BELOW_OVERFLOW, 0x7F7FFFFF, 0x7F800000]


@given(st.lists(st.integers(0, 0x7F800000), min_size=1, max_size=40), st.booleans())
@example(SPECIAL, False)
@example(SPECIAL, True)
@settings(max_examples=200, deadline=None)
def test_split_and_join_of_any_value(bits, negative):
    x = floats(*bits, negative=negative)
    high, low = split(x)
    assert (high.dtype, low.dtype) == (torch.bfloat16, torch.int16)
    assert same_bits(join(high, low), x)


@given(st.lists(st.integers(0, LARGEST_BELOW_OVERFLOW), min_size=1, max_size=40), st.booleans())
@settings(max_examples=200, deadline=None)
def test_high_is_the_nearest_bf16(bits, negative):
    x = floats(*bits, negative=negative)
    high, nearest = split(x)[0].double(), x.bfloat16().double()
    assert high.isfinite().all()
    assert torch.equal((high - x.double()).abs(), (nearest - x.double()).abs())


def test_stochastic_rounding_is_unbiased_and_between_the_neighbours():
    n = 200_000
    for x in (1.001, -1.001, 3e-5, -250.7):
        rounded = stochastic_round(torch.full((n,), x), torch.Generator().manual_seed(0)).double()
        below, above = sorted({rounded.min().item(), rounded.max().item()})
        exact = torch.tensor(x, dtype=torch.float32).item()
        assert below < exact < above
        assert set(rounded.unique().tolist()) == {below, above}
        six_sigma = 6 * (above - below) / 2 / math.sqrt(n)
        assert abs(rounded.mean().item() - exact) < six_sigma


def test_stochastic_rounding_keeps_bf16_values_and_infinities():
    x = torch.tensor([1.0, -0.0, 3.0, 1e-40, math.inf, -math.inf]).bfloat16()
    assert torch.equal(stochastic_round(x.float(), torch.Generator().manual_seed(0)), x)


def test_stochastic_rounding_is_reproducible():
    x = torch.randn(1000)
    first, again, other = (stochastic_round(x, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def give_gradients(model, t):
    """Set bf16-representable gradients, the same for every dtype."""
    generator = torch.Generator().manual_seed(t)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).bfloat16().to(p.dtype)


@pytest.mark.parametrize(
    "options",
    [{"ranks": (2,)}, {"ranks": (1, 3), "top_k": 2}, {"ranks": ()}, {"ranks": (2, 3), "optim_bits": 8}],
    ids=str,
)
def test_bf16_with_low_parts_is_the_float32_run(options):
    """Every operation sees the same float32 numbers, so nothing may differ."""
    low_model, full_model = ((wide if "optim_bits" in options else mlp)(torch.bfloat16) for _ in range(2))
    optimizers = []
    for model in (low_model, full_model.float()):
        torch.manual_seed(1)
        optimizers.append(MoLF(model, lr=1e-4, lora_lr=3e-4, **options))
    low, full = optimizers
    for t in range(6):
        for model, optimizer in ((low_model, low), (full_model, full)):
            give_gradients(model, t)
            optimizer.step()
        assert low.routing.winners() == full.routing.winners()
    for p, q in zip(low_model.parameters(), full_model.parameters(), strict=True):
        assert same_bits(join(p.detach(), low.state[p]["low"]), q.detach())
        assert torch.equal(p, split(q.detach())[0])
        assert all(torch.equal(value, low.state[p][key]) for key, value in full.state[q].items())


class Constant(nn.Module):
    """A linear layer at 1.0 whose gradient is 1 everywhere, optionally after one that never gets a gradient."""

    def __init__(self, dtype, unused=False):
        super().__init__()
        if unused:
            self.unused = nn.Linear(32, 32, dtype=dtype)
        self.linear = nn.Linear(32, 32, dtype=dtype)
        nn.init.ones_(self.linear.weight)

    def push(self, optimizer, steps):
        for _ in range(steps):
            for p in self.linear.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
        return self.linear.weight.detach().double().mean().item()


@pytest.mark.parametrize(("bf16_update", "off"), [("split", 0.004), ("stochastic", 0.002)])
def test_many_tiny_updates_add_up(bf16_update, off):
    """200 steps of 1e-4 each, when the neighbours of 1.0 in bf16 are 0.0039 and 0.0078 away."""
    model = Constant(torch.bfloat16)
    molf = MoLF(model, ranks=(), lr=1e-4, weight_decay=0.0, bf16_update=bf16_update)
    assert model.push(molf, 200) == pytest.approx(0.98, abs=off)

    naive = Constant(torch.bfloat16)
    assert naive.push(torch.optim.AdamW(naive.parameters(), lr=1e-4, weight_decay=0.0), 200) == 1.0


def test_stochastic_run_follows_float32_on_average():
    models = [mlp(torch.bfloat16), mlp(torch.bfloat16).float()]
    for model in models:
        torch.manual_seed(1)
        train(model, MoLF(model, ranks=(2,), lr=1e-3, bf16_update="stochastic"), 20)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert abs((p.float() - q).mean().item()) < TOLERANCE[torch.bfloat16]
        assert p.dtype == torch.bfloat16


def test_stochastic_noise_changes_while_the_first_layer_is_unused():
    """With the same noise at every step an element would round up always or never."""
    model = Constant(torch.bfloat16, unused=True)
    optimizer = MoLF(model, ranks=(), lr=1e-4, weight_decay=0.0, bf16_update="stochastic")
    model.push(optimizer, 200)
    assert (model.linear.weight < 1.0).double().mean() > 0.95  # nearly every element has moved
    assert model.linear.weight.min() > 0.9  # and none at every step


@pytest.mark.parametrize("routed", [True, False])
def test_stochastic_noise_changes_while_the_routed_layers_that_moved_most_rest(routed):
    """As where a head is trained first, or the layers of a model one after the other."""
    model = Constant(torch.bfloat16, unused=True)
    excluded = () if routed else ("linear",)
    optimizer = MoLF(model, ranks=(), lr=1e-4, weight_decay=0.0, bf16_update="stochastic", exclude_modules=excluded)
    for _ in range(200):
        model.unused.weight.grad = torch.ones_like(model.unused.weight)
        optimizer.step()
    model.unused.weight.grad = None
    model.push(optimizer, 200)
    assert (model.linear.weight < 1.0).double().mean() > 0.95  # nearly every element has moved
    assert model.linear.weight.min() > 0.9  # and none at every step


def test_weights_zeroed_by_hand_go_on_training():
    """Pruning, or a padding row reset to zero: an old low part must not make 0.0 a NaN."""
    model = Constant(torch.bfloat16)
    optimizer = MoLF(model, ranks=(), lr=1e-3, weight_decay=0.0)
    model.push(optimizer, 3)
    low = optimizer.state[model.linear.weight]["low"]
    low.copy_(torch.arange(-512, 512).view(32, 32))
    with torch.no_grad():
        model.linear.weight.zero_()
    assert model.push(optimizer, 5) == pytest.approx(-5e-3, rel=0.01)
    assert join(model.linear.weight.detach(), low).isfinite().all()
