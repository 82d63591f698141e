import itertools
import math

import pytest
import torch

from molf.kernels.merged_update import Effective, UpdatedPair, update_merged_weights_
from molf.layers.base import LoraPair
from molf.layers.merged import apply_lora_delta_, decay_base_
from molf.numerics.bf16 import join, split
from quantized_moments import BETAS, random_quantized, updated

LR, DECAY, T, EPS, OUT, IN, RANKS = 0.1, 0.3, 3, 1e-8, 70, 45, (5, 40)


@pytest.mark.parametrize("how", ["float", "split"])
@pytest.mark.parametrize("won", [w for w in itertools.product((0, 1), repeat=3) if any(w)], ids=str)
@pytest.mark.parametrize("b_is_nonzero", [0.0, 2.0])
def test_update_equals_the_merged_form(tables, scalars, how, won, b_is_nonzero):
    torch.manual_seed(4)
    value, m, v = torch.randn(OUT, IN), torch.randn(OUT, IN), torch.rand(OUT, IN)
    before, after = [], []
    for r, wins in zip(RANKS, won[1:], strict=True):
        old = LoraPair(torch.randn(r, IN), torch.randn(OUT, r) * (b_is_nonzero > 0), 0.2, b_is_nonzero > 0)
        new = LoraPair(old.A + 0.1 * torch.randn_like(old.A), old.B + 0.1 * torch.randn_like(old.B), old.scale)
        before.append(old)
        after.append(new if wins else old)
    c1, c2 = 1 - 0.9**T, math.sqrt(1 - 0.999**T)
    expected = value.clone()
    if won[0]:
        decay_base_(expected, before, LR * DECAY)
        expected -= LR * (m / c1) / (v.sqrt() / c2 + EPS)
    for i, (old, new) in enumerate(zip(before, after, strict=True), start=1):
        if won[i]:
            apply_lora_delta_(expected, old._replace(A=old.A.clone(), B=old.B.clone()), new)

    device = tables.device
    pairs = tuple(
        UpdatedPair(
            *(x.to(device) for x in (p.A, p.B, p.A - o.A, p.B - o.B)), 0.2, torch.tensor(b_is_nonzero, device=device)
        )
        for o, p in zip(before, after, strict=True)
    )
    weight, low = (value.clone(), None) if how == "float" else (x.clone().to(device) for x in split(value))
    layer = Effective(weight.to(device), low, (m.to(device), v.to(device)), 0, 0, LR, DECAY, pairs)
    chosen = torch.tensor(won, dtype=torch.int8, device=device)
    update_merged_weights_([layer], chosen, torch.tensor([[c1, c2]], device=device), (0.9, 0.999), EPS, scalars, tables)
    got = (layer.weight if low is None else join(layer.weight, low)).cpu()
    tolerance = {"rtol": 2e-6, "atol": 2e-6} if device.type == "cpu" else {"rtol": 2e-3, "atol": 5e-3}
    torch.testing.assert_close(got, expected, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_8_bit_moments_are_dequantized_and_updated(tables, scalars, dtype):
    """As if the moments of this step were float32; rows of 300 elements have a short last block."""
    device, ends = tables.device, []
    quantized = random_quantized(device, (OUT, 300), 0, dtype)
    for moments in (quantized, updated(quantized, 0.5)):
        torch.manual_seed(4)
        A, B, count = torch.randn(5, 300), torch.randn(OUT, 5), torch.tensor(1.0)
        pair = UpdatedPair(*(x.to(device) for x in (A, B, A, B)), 0.2, count.to(device))
        layer = Effective(torch.randn(OUT, 300).to(device), None, moments, 0, 0, LR, DECAY, (pair,))
        chosen = torch.tensor([1, 0], dtype=torch.int8, device=device)
        update_merged_weights_([layer], chosen, torch.tensor([[0.3, 0.1]], device=device), BETAS, EPS, scalars, tables)
        ends.append(layer.weight)
    torch.testing.assert_close(*ends, rtol=2e-6, atol=2e-6)


def test_noise_of_two_layers_differs(tables, scalars):
    """Also if their moments are of different kinds, so that they are updated by two launches."""
    device, shape, weights = tables.device, (OUT, 300), []
    A, B, count = torch.randn(5, 300), torch.randn(OUT, 5), torch.tensor(1.0)
    pair = UpdatedPair(*(x.to(device) for x in (A, B, A, B)), 0.2, count.to(device))
    quantized = random_quantized(device, shape, 0, torch.bfloat16)
    layers = []
    for number, moments in enumerate((quantized, updated(quantized, 0.5), updated(quantized, 0.5))):
        weights.append(torch.ones(shape, dtype=torch.bfloat16, device=device))
        layers.append(Effective(weights[-1], None, moments, number, number, LR, DECAY, (pair,)))
    chosen = torch.tensor([0, 1] * 3, dtype=torch.int8, device=device)
    seed, corrections = torch.full((), 3, device=device), torch.full((3, 2), 0.5, device=device)
    update_merged_weights_(layers, chosen, corrections, BETAS, EPS, scalars, tables, seed)
    for x, y in itertools.combinations(weights, 2):
        apart = (x.float() - y.float()).abs()
        assert (apart > 0).double().mean() > 0.1 and (apart <= y.float().abs() / 64).all()
