import pytest
import torch

from molf.numerics.bf16 import join
from molf.numerics.quantization import quantize_
from molf.scores import EPD, PFN, Coherence
from plans import DECAY, EPS, LR, adam, entry, phase2, step_of
from quantized_moments import SHAPES, dequantized, random_quantized, updated


def drawn(device, storage="float", **how):
    made = [random_quantized(device, shape, e, storage, **how) for e, shape in enumerate(SHAPES)]
    return tuple(map(list, zip(*made, strict=True)))


def value(one):
    low = one.tensor.low
    return one.tensor.param.float() if low is None else join(one.tensor.param, low)


def same(one, other):
    pairs = zip(one.tensor[:-1], other.tensor[:-1], strict=True)
    return all(torch.equal(x, y) for x, y in pairs if x is not None)


@pytest.mark.parametrize("storage", ["float", "split"])
@pytest.mark.parametrize("score", [EPD(), PFN(), Coherence()], ids=lambda s: s.name)
def test_sums_equal_the_formulas_and_nothing_is_written(device, score, storage):
    (entries, grads), (before, _) = drawn(device, storage), drawn(device, storage)
    found = step_of(entries, grads, 5, device, clip=0.5, score=score)._update_moments()[int(score.name == "coherence")]
    moments = [updated(one, grad, 0.5) for one, grad in zip(before, grads, strict=True)]
    expected = [score.term(m, v, EPS).double().sum().item() for m, v in moments]
    torch.testing.assert_close(found.cpu(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)
    assert all(map(same, entries, before))


@pytest.mark.parametrize("storage", ["float", "split", "stochastic"])
def test_all_moments_are_written_and_winners_alone_move(device, storage):
    (entries, grads), (before, _) = drawn(device, storage), drawn(device, storage)
    phase2(step_of(entries, grads, 5, device, clip=0.5, chosen={0, 2, 4}))
    for one, old, grad in zip(entries, before, grads, strict=True):
        m, v = updated(old, grad, 0.5)
        assert_written(one, m, v)
        if old.expert % 2:
            assert torch.equal(one.tensor.param, old.tensor.param)
            continue
        expected = value(old) * (1 - LR * DECAY) - (LR * adam(m, v)).view(old.tensor.param.shape)
        if storage == "stochastic":  # to one of the two neighbours in bf16
            assert ((value(one) - expected).abs() <= expected.abs() / 128 + 1e-6).all()
        else:
            torch.testing.assert_close(value(one), expected, rtol=5e-6, atol=5e-6)


def assert_written(one, m, v):
    """Codes are those of the plain step, but for a last bit between two of them."""
    t = one.tensor
    for x, signed, codes, absmax in (
        (m, True, t.exp_avg, t.exp_avg_absmax),
        (v, False, t.exp_avg_sq, t.exp_avg_sq_absmax),
    ):
        expected, most = torch.zeros_like(x, dtype=torch.uint8), torch.zeros_like(absmax)
        quantize_(x.clone(), expected, most, signed)
        torch.testing.assert_close(absmax, most, rtol=1e-6, atol=0)
        apart = (codes.view(expected.shape).int() - expected.int()).abs()
        assert apart.numel() == 0 or (apart.max() <= 1 and (apart > 0).double().mean() < 0.01)


def test_second_moments_above_zero_stay_so(device):
    one, grad = random_quantized(device, (2, 300), 0)
    one.tensor.exp_avg_sq_absmax.zero_()
    grad[:] = 1e-5
    grad[:, ::256] = 1.0
    phase2(step_of([one], [grad], 1, device))
    assert (dequantized(one)[1] > 0).all()


def test_a_skipped_step_writes_nothing_and_adds_nothing(device):
    (entries, grads), (before, _) = drawn(device), drawn(device)
    step = step_of(entries, grads, 5, device, chosen=set(range(5)), go=0.0)
    assert not step._update_moments()[0].any()
    phase2(step)
    assert all(map(same, entries, before))


@pytest.mark.parametrize("chosen", [{0}, {1}, {0, 1}], ids=str)
@pytest.mark.parametrize("storage", ["float", "split"])
def test_an_effective_weight_moves_as_with_float32_moments(device, storage, chosen):
    """Rows of 300 elements have a short last block."""
    ends = []
    for quantized in (True, False):
        one, grad = random_quantized(device, (70, 300), 0, storage, effective=True)
        if not quantized:
            m, v = updated(one, grad, 0.5)
            one = entry(one.tensor.param, m, v, 0, low=one.tensor.low, effective=True)
        torch.manual_seed(4)
        pair = [
            entry(x, torch.randn_like(x), torch.rand_like(x), 1, scale=scale, weight=0)
            for x, scale in ((torch.randn(8, 300, device=device), 1.0), (torch.randn(70, 8, device=device), 0.2))
        ]
        ends.append(one)
        phase2(step_of([one, *pair], [grad], 2, device, clip=0.5, chosen=chosen))
    torch.testing.assert_close(*map(value, ends), rtol=5e-6, atol=5e-6)
