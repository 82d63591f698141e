import math

import pytest
import torch

from molf.kernels.moments import Scalars
from molf.kernels.requantize import QuantizedStep, requantize_
from molf.numerics.bf16 import join, split
from molf.numerics.quantization import quantize_
from quantized_moments import BETAS, EPS, SHAPES, dequantized, random_quantized, updated

LR, DECAY, T = 0.1, 0.3, 3


def corrections(device):
    return torch.tensor([[1 - BETAS[0] ** T, math.sqrt(1 - BETAS[1] ** T)]], device=device)


def made(device, how, expert, shape):
    quantized = random_quantized(device, shape, expert, torch.float32 if how == "float" else torch.bfloat16)
    value = torch.randn(shape, generator=torch.Generator().manual_seed(50 + expert))
    high, low = split(value)
    if how == "elsewhere":
        return QuantizedStep(quantized, None, None, 0, expert, LR, DECAY)
    param, low = (value, None) if how == "float" else (high, low if how == "split" else None)
    low = None if low is None else low.clone().to(device)
    return QuantizedStep(quantized, param.clone().to(device), low, 0, expert, LR, DECAY)


def value(step):
    return join(step.param, step.low) if step.low is not None else step.param.float()


def requantize(steps, chosen, tables, scalars):
    chosen = torch.tensor(chosen, dtype=torch.int8, device=tables.device)
    seed = torch.full((), 3, device=tables.device)
    requantize_(steps, chosen, corrections(tables.device), BETAS, EPS, scalars, tables, seed)


@pytest.mark.parametrize("how", ["float", "split", "stochastic", "elsewhere"])
def test_all_moments_are_written_and_winners_alone_move(tables, scalars, how):
    steps, before = ([made(tables.device, how, e, s) for e, s in enumerate(SHAPES)] for _ in range(2))
    requantize(steps, [1, 0, 1, 0, 1], tables, scalars)
    for step, old in zip(steps, before, strict=True):
        m, v = updated(old.quantized, 0.5)
        assert_written(step.quantized, m, v)
        if how == "elsewhere":
            continue
        if old.quantized.expert % 2:
            assert torch.equal(step.param, old.param)
            continue
        c1, c2 = corrections(tables.device)[0]
        change = LR * (m / c1) / (v.sqrt() / c2 + EPS)
        expected = value(old) * (1 - LR * DECAY) - change.view(old.param.shape)
        if how == "stochastic":  # to one of the two neighbours in bf16
            assert ((value(step) - expected).abs() <= expected.abs() / 128 + 1e-6).all()
        else:
            torch.testing.assert_close(value(step), expected, rtol=5e-6, atol=5e-6)


def assert_written(entry, m, v):
    """Codes are those of the plain step, but for a last bit between two of them."""
    for x, signed, codes, absmax in (
        (m, True, entry.exp_avg, entry.exp_avg_absmax),
        (v, False, entry.exp_avg_sq, entry.exp_avg_sq_absmax),
    ):
        expected, most = torch.zeros_like(x, dtype=torch.uint8), torch.zeros_like(absmax)
        quantize_(x.clone(), expected, most, signed)
        torch.testing.assert_close(absmax, most, rtol=1e-6, atol=0)
        apart = (codes.view(expected.shape).int() - expected.int()).abs()
        assert apart.numel() == 0 or (apart.max() <= 1 and (apart > 0).double().mean() < 0.01)


def test_second_moments_above_zero_stay_so(tables, scalars):
    step = made(tables.device, "elsewhere", 0, (2, 300))
    step.quantized.exp_avg_sq_absmax.zero_()
    step.quantized.grad[:] = 1e-5
    step.quantized.grad[:, ::256] = 1.0
    requantize([step], [0], tables, scalars)
    assert (dequantized(step.quantized)[1] > 0).all()


def test_a_skipped_step_writes_nothing(tables, scalars):
    step, before = (made(tables.device, "float", 0, (2, 300)) for _ in range(2))
    requantize([step], [1], tables, Scalars(go=torch.zeros_like(scalars.go), clip=scalars.clip))
    assert torch.equal(step.param, before.param)
    assert all(torch.equal(x, y) for x, y in zip(step.quantized[:5], before.quantized[:5], strict=True))
