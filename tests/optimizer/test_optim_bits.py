"""Moments in 8 bits (``optim_bits=8``): each step against the oracle that reads the moments the codes stand for."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import molf.numerics.adamw
from conftest import TOLERANCE
from eight_bits import branched_pair, built, dequantized, merged_pair, quantized
from molf import MoLF, add_lora_experts
from molf.numerics.quantization import code_values, dequantize
from small import assert_same_bits, differing, loss_of, mlp, snapshot, train


@pytest.mark.parametrize("pair", [merged_pair, branched_pair])
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"score": "pfn", "betas": (0.8, 0.95), "eps": 1e-4}], ids=str)
def test_every_step_equals_the_oracle(pair, options):
    model, optimizer, twin, oracle = pair(**options)
    won = set()
    for t in range(6):
        for m in (model, twin):
            m.zero_grad()
            loss_of(m, t).backward()
        if t:  # there is no state before
            oracle.read_moments(optimizer)
        optimizer.step()
        oracle.step()
        won |= {tuple(sorted(names)) for names in optimizer.routing.winners().values()}
        for module, experts in oracle.experts.items():
            assert sorted(optimizer.routing.winners()[module]) == sorted(oracle.winners[module])
            scores = optimizer.routing.scores[optimizer.routing.modules.index(module)]
            assert scores.tolist() == pytest.approx(list(oracle.scores[module].values()), rel=1e-3)
            for expert in experts:
                for leaf, weight in expert.weights.items():
                    found = getattr(optimizer.experts[module][expert.name], leaf)
                    torch.testing.assert_close(found, weight.value, rtol=0, atol=5 * TOLERANCE[torch.float32])
        assert_codes_are_nearest(optimizer, oracle)
    assert len(won) > 1


def assert_codes_are_nearest(optimizer, oracle):
    assert len(quantized(optimizer)) == 3
    for p, own in quantized(optimizer).items():
        weight = oracle.of(p, optimizer)
        for key, exact in (("exp_avg", weight.m), ("exp_avg_sq", weight.v)):
            most = own[f"{key}.absmax"].repeat_interleave(256, 1)[:, : exact.shape[1]]
            values = code_values(key == "exp_avg", exact.device)
            least = (exact[..., None] / most.clamp(min=1e-30)[..., None] - values).abs().amin(-1) * most
            smallest = values[1] * most if key == "exp_avg_sq" else 0.0  # above 0 stays above 0
            assert ((dequantized(own, key) - exact).abs() <= least + smallest + 1e-5 * most + 1e-12).all()


def test_which_moments_are_in_8_bits():
    model, optimizer = built()
    train(model, optimizer, 1)
    assert {id(p) for p in quantized(optimizer)} == {id(model[i].weight) for i in (0, 1, 4)}
    for p, own in optimizer.state.items():
        for key, value in own.items():
            codes = p in quantized(optimizer) and key in ("exp_avg", "exp_avg_sq")
            assert value.dtype == (torch.uint8 if codes else torch.float32), key
    own = optimizer.state[model[1].weight]
    assert own["exp_avg"].shape == (41, 300)
    assert own["exp_avg.absmax"].shape == own["exp_avg_sq.absmax"].shape == (41, 2)


def test_adapters_stay_in_32_bits():
    model = add_lora_experts(nn.Sequential(nn.Linear(300, 300)), ranks=(16,), freeze_base=False, exclude_modules=())
    optimizer = MoLF(model, optim_bits=8)
    model(torch.ones(1, 300)).sum().backward()
    optimizer.step()
    assert [list(p.shape) for p in quantized(optimizer)] == [[300, 300]]
    assert len(optimizer.state) == 4


def test_bytes_of_the_state():
    """Two codes an element, and two maxima a block."""
    sizes = {}
    for bits in (8, 32):
        model, optimizer = built(optim_bits=bits, ranks=())
        train(model, optimizer, 1)
        sizes[bits] = sum(x.numel() * x.element_size() for own in optimizer.state.values() for x in own.values())
    elements, blocks = 16 * 300 + 300 * 41 + 41 * 257, 16 * 2 + 41 * 2 + 257 * 1
    assert sizes[32] - sizes[8] == 8 * elements - (2 * elements + 8 * blocks)


def test_an_element_whose_second_moment_is_tiny_takes_no_leap():
    """If v rounded to 0 and m did not, the next step without a gradient would be m / eps."""
    model = nn.Sequential(nn.Linear(256, 16, bias=False))
    optimizer = MoLF(model, ranks=(), lr=1e-3, weight_decay=0.0, optim_bits=8)
    for gradient in (1e-4, 0.0):  # far below the largest one of its block
        before = model[0].weight.detach().clone()
        model[0].weight.grad = torch.full((16, 256), gradient)
        model[0].weight.grad[:, 0] = 1.0
        optimizer.step()
        assert (model[0].weight - before).abs().max() < 2e-3


@pytest.mark.parametrize("budget", [1024, 256])
def test_cutting_into_blocks_changes_nothing(monkeypatch, budget):
    """Whole rows at a time, or parts of a row that end with a block of 256. Kernels round differently at an array's end."""
    whole, optimizer = built()
    train(whole, optimizer, 1)
    monkeypatch.setattr(molf.numerics.adamw, "_CPU_BLOCK", budget)
    model, other = built()
    train(model, other, 1)
    assert len(quantized(optimizer)) == 3
    for p, q in zip(quantized(optimizer), quantized(other), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=TOLERANCE[torch.float32])
        for key in ("exp_avg", "exp_avg_sq"):
            one, two = optimizer.state[p], other.state[q]
            torch.testing.assert_close(one[f"{key}.absmax"], two[f"{key}.absmax"], rtol=1e-6, atol=0)
            assert (one[key] == two[key]).double().mean() > 0.999


def test_tensors_of_more_dimensions_are_matrices_of_their_first():
    model = nn.Sequential(nn.Conv1d(40, 30, 7), nn.Flatten(), nn.Linear(60, 2))
    optimizer = MoLF(model, ranks=(2,), lr=1e-3, optim_bits=8)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(3, 40, 8)).square().sum().backward()
        optimizer.step()
    own = optimizer.state[model[0].weight]
    assert own["exp_avg"].shape == (30, 40, 7) and own["exp_avg.absmax"].shape == (30, 2)
    rows = dequantize(own["exp_avg"].view(30, 280), own["exp_avg.absmax"], True)
    assert rows.abs().amax(1).allclose(own["exp_avg.absmax"].amax(1), rtol=0.01)


class Casts(TorchDispatchMode):
    """Records every operation that converts codes to another dtype."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and any(getattr(x, "dtype", None) == torch.uint8 for x in args):
            self.found += [] if result.dtype == torch.uint8 else [str(func)]
        return result


def test_loading_takes_no_memory_beside_that_of_the_codes():
    model, optimizer = built(torch.bfloat16)
    train(model, optimizer, 1)
    resumed, other = built(torch.bfloat16)
    with Casts() as casts:
        other.load_state_dict(optimizer.state_dict())
    assert not casts.found
    resumed.load_state_dict(model.state_dict())
    assert_same_bits(model, optimizer, resumed, other)


@pytest.mark.parametrize(("saved", "here"), [(8, 32), (32, 8)])
def test_a_state_of_other_bits_is_refused(saved, here):
    model, optimizer = built(optim_bits=saved)
    train(model, optimizer, 1)
    other_model, other = built(optim_bits=here)
    before = snapshot(other_model, other)
    words = rf"0\.weight has moments of {saved} bits in the state and of {here} bits here; .* optim_bits={saved}"
    with pytest.raises(ValueError, match=words):
        other.load_state_dict(optimizer.state_dict())
    assert not differing(before, snapshot(other_model, other))


@pytest.mark.parametrize(
    ("dtype", "bits", "words"),
    [
        *((torch.float32, bits, r"optim_bits=.*: use one of \[32, 8\]") for bits in (4, 16, 8.0, "8", None, True)),
        (torch.float32, 8, "optim_bits=8 would change nothing: no matrix of 4,096 or more elements"),
        (torch.float64, 8, "optim_bits=8 with float64 weights: .* or optim_bits=32"),
    ],
    ids=str,
)
def test_bits_that_are_refused(dtype, bits, words):
    with pytest.raises(ValueError, match=words):
        MoLF(mlp(dtype), ranks=(2,), optim_bits=bits)


def test_8_bits_that_would_change_nothing_are_refused():
    """Nothing trains but LoRA pairs."""
    model = add_lora_experts(nn.Sequential(nn.Linear(80, 80)), ranks=(2, 4), target_modules=["0"], exclude_modules=())
    with pytest.raises(ValueError, match="optim_bits=8 would change nothing"):
        MoLF(model, optim_bits=8)
