"""Saving, loading and skipping with moments in 8 bits, and where they are refused."""

import io

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from eight_bits import built
from molf import MoLF, add_lora_experts
from small import assert_same_bits, differing, loss_of, mlp, snapshot, train

KINDS = {
    "float32": (torch.float32, {}),
    "clipped, two winners": (torch.float32, {"max_grad_norm": 0.1, "top_k": 2}),
    "bf16 split": (torch.bfloat16, {}),
    "bf16 stochastic": (torch.bfloat16, {"bf16_update": "stochastic"}),
}


@pytest.mark.parametrize(("dtype", "options"), KINDS.values(), ids=KINDS.keys())
def test_interrupted_and_resumed_is_uninterrupted(dtype, options):
    model, optimizer = built(dtype, **options)
    train(model, optimizer, 3)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    resumed, other = built(dtype, seed=9, **options)
    for o, state in zip((resumed, other), torch.load(file, weights_only=True), strict=True):
        o.load_state_dict(state)
    assert_same_bits(model, optimizer, resumed, other)
    assert train(model, optimizer, range(3, 6)) == train(resumed, other, range(3, 6))
    assert_same_bits(model, optimizer, resumed, other)


class Casts(TorchDispatchMode):
    """Notes every operation that makes anything but codes of codes."""

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
    words = (
        f"ordinary parameter has moments of {saved} bits in the state and of {here} bits here; .* optim_bits={saved}"
    )
    with pytest.raises(ValueError, match=words):
        other.load_state_dict(optimizer.state_dict())
    assert not differing(before, snapshot(other_model, other))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_step_with_a_non_finite_gradient_leaves_all_codes(bad):
    model, optimizer = built()
    train(model, optimizer, 2)
    before = snapshot(model, optimizer)
    optimizer.zero_grad()
    loss_of(model, 2).backward()
    model[4].weight.grad[3, 5] = bad
    optimizer.step()
    assert optimizer.skipped_steps == 1 and not differing(before, snapshot(model, optimizer))


@pytest.mark.parametrize("bits", [4, 16, 8.0, "8", None, True])
def test_other_numbers_of_bits_are_refused(bits):
    with pytest.raises(ValueError, match=r"optim_bits=.*: use one of \[32, 8\]"):
        MoLF(mlp(torch.float32), ranks=(2,), optim_bits=bits)


@pytest.mark.parametrize("adapters", [False, True])
def test_8_bits_that_would_change_nothing_are_refused(adapters):
    """Small matrices only; or nothing that trains but LoRA pairs."""
    model = nn.Sequential(nn.Linear(80, 80)) if adapters else mlp(torch.float32)
    if adapters:
        model = add_lora_experts(model, ranks=(2, 4), target_modules=["0"], exclude_modules=())
    with pytest.raises(ValueError, match="optim_bits=8 would change nothing: no matrix of 4,096 or more elements"):
        MoLF(model, optim_bits=8, **({} if adapters else {"ranks": (2,)}))


def test_float64_weights_are_refused():
    with pytest.raises(ValueError, match="optim_bits=8 with float64 weights: .* or optim_bits=32"):
        MoLF(mlp(torch.float64), ranks=(2,), optim_bits=8)
