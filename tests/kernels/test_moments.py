import pytest
import torch

from molf.scores import EPD, PFN, Coherence
from plans import BETAS, EPS, entry, step_of

# Elements and gradient of each expert's tensors; the second expert has two, such as B beside A.
TENSORS = [
    (0, 5000, torch.bfloat16),
    (1, 37, torch.float32),
    (2, 9001, torch.bfloat16),
    (3, 1, torch.float32),
    (1, 20, torch.float32),
]


def drawn(device, **how):
    generator = torch.Generator().manual_seed(1)
    entries, grads = [], []
    for i, (expert, n, dtype) in enumerate(TENSORS):
        grad, m, v = (torch.randn(n, generator=generator) for _ in range(3))
        grad, m, v = grad.to(device, dtype), m.to(device), v.square().to(device)
        own = how | {"effective": i == 2, "counted": how.get("counted", True)}
        entries.append(entry(torch.empty_like(grad), m, v, expert, **own))
        grads.append(grad)
    return entries, grads


@pytest.mark.parametrize("score", [EPD(), PFN()], ids=lambda s: s.name)
def test_moments_and_sums_equal_the_formulas(device, score):
    """Aligned tensors and others, of gradients of both dtypes, so that the sums of one expert come from several launches."""
    (entries, grads), (before, _) = drawn(device), drawn(device)
    step = step_of(entries, grads, 4, device, clip=0.5, score=score)
    assert len(step._tables.moments) == 4
    totals, others = step._update_moments()
    expected = torch.zeros(4, dtype=torch.float64)
    for now, old, grad in zip(entries, before, grads, strict=True):
        g, (m, v) = 0.5 * grad.float(), (old.tensor.exp_avg, old.tensor.exp_avg_sq)
        m, v = m + (1 - BETAS[0]) * (g - m), BETAS[1] * v + (1 - BETAS[1]) * g * g
        torch.testing.assert_close(now.tensor.exp_avg, m, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(now.tensor.exp_avg_sq, v, rtol=2e-6, atol=2e-6)
        expected[now.expert] += score.term(m, v, EPS).double().sum().cpu()
    torch.testing.assert_close(totals.cpu(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(others.sum(), grads[2].double().square().sum(), rtol=1e-6, atol=0)


def test_for_coherence_both_sums_are_of_the_score(device):
    (entries, grads), (same, _) = drawn(device), drawn(device)
    totals, others = step_of(entries, grads, 4, device, score=Coherence())._update_moments()
    descent, _ = step_of(same, grads, 4, device, score=EPD())._update_moments()
    expected = torch.zeros(4, dtype=torch.float64)
    for one in entries:
        expected[one.expert] += one.tensor.exp_avg_sq.sqrt().double().sum().cpu()
    torch.testing.assert_close(others.cpu(), expected, rtol=1e-6, atol=0)
    assert torch.equal(totals, descent)


def test_tensors_that_another_rank_counts_are_updated_and_add_nothing(device):
    (entries, grads), (counted, same) = drawn(device, counted=False), drawn(device)
    assert not step_of(entries, grads, 4, device)._update_moments().any()
    totals, squares = step_of(counted, same, 4, device)._update_moments()
    assert totals.all() and squares.sum() > 0
    for one, other in zip(entries, counted, strict=True):
        assert torch.equal(one.tensor.exp_avg, other.tensor.exp_avg)


def test_a_skipped_step_writes_nothing_and_adds_nothing(device):
    (entries, grads), (before, _) = drawn(device), drawn(device)
    totals, _ = step_of(entries, grads, 4, device, go=0.0)._update_moments()
    assert not totals.any()
    for one, other in zip(entries, before, strict=True):
        assert torch.equal(one.tensor.exp_avg, other.tensor.exp_avg)
