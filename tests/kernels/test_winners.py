import math

import pytest
import torch

from molf.kernels.moments import Scalars
from molf.kernels.winners import Step, move_winners_
from molf.numerics.bf16 import join, split

LR, DECAY, T, EPS = 0.1, 0.3, 3, 1e-8


def corrections(device):
    return torch.tensor([[1 - 0.9**T, math.sqrt(1 - 0.999**T)]], device=device)


def steps(device, storage, keep=False):
    generator = torch.Generator().manual_seed(5)
    made = []
    for expert, n in enumerate((5000, 41)):
        value, m, v = (torch.randn(n, generator=generator) for _ in range(3))
        high, low = split(value)
        param = value if storage == "float" else high.clone()
        low = low.clone().to(device) if storage == "split" else None
        change = torch.full((n,), 7.0, device=device) if keep else None
        param, m, v = (x.to(device) for x in (param, m, v.square()))
        made.append(Step(param, low, m, v, expert, 0, expert, LR, DECAY, change))
    return made


def value(step):
    return join(step.param, step.low) if step.low is not None else step.param.float()


@pytest.mark.parametrize("storage", ["float", "split", "stochastic"])
def test_winners_take_the_step_and_losers_keep_every_bit(tables, scalars, storage):
    won, lost = steps(tables.device, storage)
    before, kept = value(won).clone(), lost.param.clone()
    chosen = torch.tensor([1, 0], dtype=torch.int8, device=tables.device)
    seed = torch.full((), 3, device=tables.device)
    move_winners_("test", [won, lost], chosen, corrections(tables.device), EPS, scalars, tables, seed)
    c1, c2 = corrections(tables.device)[0]
    expected = before * (1 - LR * DECAY) - LR * (won.exp_avg / c1) / (won.exp_avg_sq.sqrt() / c2 + EPS)
    if storage == "stochastic":  # to one of the two neighbours in bf16, right on the average
        moved = value(won)
        assert (moved - expected).abs().le(expected.abs() / 128 + 1e-6).all()
        error = ((moved - expected) / expected.abs().clamp(min=1e-3)).mean()
        assert abs(error) < 3 * (1 / 256) / math.sqrt(len(moved))
    else:
        torch.testing.assert_close(value(won), expected, rtol=2e-6, atol=2e-6)
    assert torch.equal(lost.param, kept)


def test_the_change_is_written_on_request(tables, scalars):
    won, lost = steps(tables.device, "float", keep=True)
    before = won.param.clone()
    chosen = torch.tensor([1, 0], dtype=torch.int8, device=tables.device)
    skipped = Scalars(go=torch.zeros_like(scalars.go), clip=scalars.clip)
    move_winners_("test", [won, lost], chosen, corrections(tables.device), EPS, skipped, tables)
    assert torch.equal(won.param, before)
    move_winners_("test", [won, lost], chosen, corrections(tables.device), EPS, scalars, tables)
    torch.testing.assert_close(won.change, won.param - before, rtol=0, atol=1e-6)
    assert (lost.change == 7).all()
