import math

import pytest
import torch

from molf.numerics.bf16 import join, split
from plans import DECAY, LR, adam, entry, phase2, step_of

SIZES = [5000, 41, 5000]


def drawn(device, storage):
    """Tensors of one expert each, the last one like the first."""
    made = []
    for expert, n in enumerate(SIZES):
        generator = torch.Generator().manual_seed(n)
        value, m, v = (torch.randn(n, generator=generator) for _ in range(3))
        high, low = split(value)
        param = value if storage == "float" else high.clone()
        low = low.clone().to(device) if storage == "split" else None
        made.append(entry(param.to(device), m.to(device), v.square().to(device), expert, low=low))
    return made


def value(one):
    low = one.tensor.low
    return one.tensor.param.float() if low is None else join(one.tensor.param, low)


def move(entries, chosen, device, **how):
    grads = [torch.empty(0, device=device)] * len(entries)  # not read
    phase2(step_of(entries, grads, len(entries), device, chosen=chosen, **how))


@pytest.mark.parametrize("storage", ["float", "split", "stochastic"])
def test_winners_take_the_step_and_losers_keep_every_bit(device, storage):
    entries, before = drawn(device, storage), drawn(device, storage)
    move(entries, {0, 1}, device)
    for one, old in zip(entries[:2], before, strict=False):
        expected = value(old) * (1 - LR * DECAY) - LR * adam(old.tensor.exp_avg, old.tensor.exp_avg_sq)
        if storage == "stochastic":  # to one of the two neighbours in bf16, right on the average
            error = value(one) - expected
            assert error.abs().le(expected.abs() / 128 + 1e-6).all()
            mean = (error / expected.abs().clamp(min=1e-3)).mean()
            assert abs(mean) < 3 * (1 / 256) / math.sqrt(len(error))
        else:
            torch.testing.assert_close(value(one), expected, rtol=2e-6, atol=2e-6)
    assert torch.equal(value(entries[2]), value(before[2]))


def test_a_skipped_step_moves_nothing(device):
    entries, before = drawn(device, "float"), drawn(device, "float")
    move(entries, {0, 1, 2}, device, go=0.0)
    assert all(torch.equal(value(one), value(old)) for one, old in zip(entries, before, strict=True))


def test_noise_differs_between_tensors_blocks_and_steps(device):
    """Two tensors of the same values are rounded differently, and a second block is no copy of the first."""
    ends = []
    for seed in (3, 4):
        entries = drawn(device, "stochastic")
        for one in entries:
            one.tensor.param.fill_(1.0)
            one.tensor.exp_avg.fill_(1e-3)
            one.tensor.exp_avg_sq.fill_(1.0)
        move(entries, {0, 2}, device, seed=seed)
        ends += [value(entries[0]), value(entries[2])]
    ends += [ends[0][:900], ends[0][4096 : 4096 + 900]]
    pairs = [(0, 1), (0, 2), (4, 5)]
    assert all((ends[i] != ends[j]).double().mean() > 0.1 for i, j in pairs)
