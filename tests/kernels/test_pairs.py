"""The step of pairs and what it changes in the effective weight, against the formulas of the merged form."""

import itertools

import pytest
import torch

from molf.kernels import launches
from molf.kernels.pairs import pair_gradients
from molf.layers.base import LoraPair
from molf.layers.merged import apply_lora_delta_, decay_base_
from molf.numerics.bf16 import join, split
from plans import DECAY, LR, adam, entry, phase2, step_of

OUT, IN, RANKS, SCALE = 70, 45, (5, 40), 0.2
WON = [won for won in itertools.product((0, 1), repeat=3) if any(won)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_equal_the_formulas(device, dtype, tensor_cores):
    """Also of two pairs of one layer, into memory with other content."""
    torch.manual_seed(2)
    tolerance = 5e-2 if tensor_cores else 2e-5
    dense = [torch.randn(70, 33, device=device).to(dtype), torch.randn(16, 130, device=device).to(dtype)]
    pairs = [
        tuple(
            entry(torch.randn(shape, device=device), None, None, 1, scale=scale, weight=row)
            for shape, scale in (((r, G.shape[1]), 1.0), ((len(G), r), 0.3))
        )
        for row, G in enumerate(dense)
        for r in (5, 12)
    ]
    dAs, dBs = ([torch.full_like(pair[i].tensor.param, torch.nan) for pair in pairs] for i in (0, 1))
    pair_gradients(pairs, dense, dAs, dBs)
    for (a, b), dA, dB in zip(pairs, dAs, dBs, strict=True):
        G, A, B = dense[a.weight].double(), a.tensor.param.double(), b.tensor.param.double()
        torch.testing.assert_close(dB, 0.3 * (G @ A.T).float(), rtol=1e-5, atol=tolerance)
        torch.testing.assert_close(dA, 0.3 * (B.T @ G).float(), rtol=1e-5, atol=tolerance)


def drawn(device, storage, b_is_nonzero):
    """A layer for every set of winners, with two pairs each: the entries of the weights, then those of the pairs."""
    torch.manual_seed(4)
    weights, pairs = [], []
    for layer in range(len(WON)):
        value = torch.randn(OUT, IN)
        high, low = split(value)
        param = value if storage == "float" else high.clone()
        low = low.clone().to(device) if storage == "split" else None
        moments = torch.randn(OUT, IN).to(device), torch.rand(OUT, IN).to(device)
        weights.append(entry(param.to(device), *moments, 3 * layer, low=low, effective=True))
        for e, r in enumerate(RANKS, start=1):
            A, B = torch.randn(r, IN), torch.randn(OUT, r) * b_is_nonzero
            for x, scale in ((A, 1.0), (B, SCALE)):
                m, v = torch.randn(x.shape).to(device), torch.rand(x.shape).to(device)
                pairs.append(entry(x.to(device), m, v, 3 * layer + e, decay=0.2, scale=scale, weight=layer))
    return [*weights, *pairs]


def value(one):
    low = one.tensor.low
    return (one.tensor.param.float() if low is None else join(one.tensor.param, low)).cpu().clone()


def after(one, decay):
    """A tensor after its step, by the formula."""
    return value(one) * (1 - LR * decay) - LR * adam(one.tensor.exp_avg, one.tensor.exp_avg_sq).cpu()


def expected_weight(weight, pairs, won, b_is_nonzero):
    before = [LoraPair(value(A), value(B), SCALE, b_is_nonzero) for A, B in zip(pairs[::2], pairs[1::2], strict=True)]
    expected = value(weight)
    if won[0]:
        decay_base_(expected, before, LR * DECAY)
        expected -= LR * adam(weight.tensor.exp_avg, weight.tensor.exp_avg_sq).cpu()
    for i, old in enumerate(before):
        if won[i + 1]:
            now = LoraPair(after(pairs[2 * i], 0.2), after(pairs[2 * i + 1], 0.2), SCALE)
            apply_lora_delta_(expected, old, now)
    return expected


@pytest.mark.parametrize(
    ("storage", "b_is_nonzero", "at_once"), [("float", True, None), ("float", False, 30_000), ("split", True, 30_000)]
)
def test_a_step_equals_the_merged_form(device, storage, b_is_nonzero, at_once, tensor_cores, monkeypatch):
    """All sets of winners at once; in chunks of two layers with ``at_once``."""
    if at_once:
        monkeypatch.setattr(launches, "_AT_ONCE", at_once)
    entries, before = drawn(device, storage, b_is_nonzero), drawn(device, storage, b_is_nonzero)
    count = len(WON)
    chosen = {3 * layer + e for layer, won in enumerate(WON) for e in range(3) if won[e]}
    grads = [torch.empty(0, device=device)] * count
    step = step_of(entries, grads, 3 * count, device, chosen=chosen)
    assert len(step._tables.chunks) == (1 if at_once is None else 4)
    phase2(step)
    tolerance = {"rtol": 2e-3, "atol": 5e-3} if tensor_cores else {"rtol": 5e-6, "atol": 5e-6}
    for layer, won in enumerate(WON):
        own, pairs = before[layer], before[count + 4 * layer : count + 4 * layer + 4]
        now = entries[count + 4 * layer : count + 4 * layer + 4]
        torch.testing.assert_close(value(entries[layer]), expected_weight(own, pairs, won, b_is_nonzero), **tolerance)
        for j, (one, old) in enumerate(zip(now, pairs, strict=True)):
            moved = won[1 + j // 2]
            torch.testing.assert_close(value(one), after(old, 0.2) if moved else value(old), rtol=2e-6, atol=2e-6)
            assert moved or torch.equal(value(one), value(old))


def test_a_skipped_step_moves_nothing(device):
    """Also if gradients, and so products, are not finite."""
    entries, before = drawn(device, "float", True), drawn(device, "float", True)
    count = len(WON)
    for one in entries:
        one.tensor.exp_avg.fill_(torch.nan)
    grads = [torch.empty(0, device=device)] * count
    everyone = set(range(3 * count))
    phase2(step_of(entries, grads, 3 * count, device, chosen=everyone, go=0.0))
    assert all(torch.equal(value(one), value(old)) for one, old in zip(entries, before, strict=True))
