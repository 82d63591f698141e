import pytest
import torch

from molf.kernels.moments import Moments, Scalars, update_moments_
from molf.scores import EPD, PFN

BETAS, EPS = (0.9, 0.99), 1e-8
SIZES = [(5000, torch.bfloat16), (37, torch.float32), (9000, torch.bfloat16), (1, torch.float32)]


def entries(device):
    generator = torch.Generator().manual_seed(1)

    def draw(n):
        return torch.randn(n, generator=generator)

    made = [Moments(draw(n).to(dtype), draw(n), draw(n).square(), e) for e, (n, dtype) in enumerate(SIZES)]
    made.append(Moments(draw(20), draw(20), draw(20).square(), 1))  # a second tensor of an expert, such as B beside A
    return [Moments(*(x.to(device) for x in entry[:3]), entry.expert) for entry in made]


@pytest.mark.parametrize("score", [EPD(), PFN()], ids=lambda s: s.name)
def test_moments_and_sums_equal_the_formulas(tables, scalars, score):
    given, moments, expected = entries(tables.device), [], [0.0] * 4
    for entry in entries(tables.device):
        g = 0.5 * entry.grad.float()
        m = entry.exp_avg + (1 - BETAS[0]) * (g - entry.exp_avg)
        v = BETAS[1] * entry.exp_avg_sq + (1 - BETAS[1]) * g * g
        expected[entry.expert] += score.term(m, v, EPS).double().sum().item()
        moments.append((m, v))
    totals = update_moments_(given, 4, BETAS, EPS, score.name == "pfn", scalars, tables)
    for entry, (m, v) in zip(given, moments, strict=True):
        torch.testing.assert_close(entry.exp_avg, m, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(entry.exp_avg_sq, v, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(totals.cpu(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)


def test_tensors_that_another_rank_counts_are_updated_and_add_nothing(tables, scalars):
    given, counted = entries(tables.device), entries(tables.device)
    given = [given[0]._replace(counted=False), *given[1:4], given[4]._replace(counted=False)]
    totals = update_moments_(given, 4, BETAS, EPS, False, scalars, tables)
    expected = update_moments_(counted[1:4], 4, BETAS, EPS, False, scalars, tables)
    assert torch.equal(totals, expected) and totals[1:].all() and not totals[0]
    update_moments_([counted[0], counted[4]], 4, BETAS, EPS, False, scalars, tables)
    for one, other in zip(given, counted, strict=True):
        assert torch.equal(one.exp_avg, other.exp_avg)


def test_a_skipped_step_changes_nothing(tables, scalars):
    given, before = entries(tables.device), entries(tables.device)
    out = Scalars(go=torch.zeros_like(scalars.go), clip=scalars.clip)
    totals = update_moments_(given, 4, BETAS, EPS, False, out, tables)
    assert not totals.any()
    assert all(torch.equal(x, y) for a, b in zip(given, before, strict=True) for x, y in zip(a[:3], b[:3], strict=True))
