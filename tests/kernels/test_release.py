"""Gradient release by the kernels, layer by layer, against their step of the whole model: the same bits."""

import pytest
import torch

from backward_steps import pair_of
from fused import DEVICE, quantizable
from small import differing, loss_of, mlp, snapshot, train

OPTIONS = {
    "epd": {},
    "pfn": {"score": "pfn", "top_k": 2},
    "bf16 split": {"dtype": torch.bfloat16},
    "8 bits": {"make": quantizable, "optim_bits": 8},
}


def made(dtype=torch.float32, make=mlp, **options):
    return pair_of(make(dtype).to(DEVICE), fused=True, **{"ranks": (2, 4), **options})


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_layer_by_layer_is_the_whole_step(options):
    model, optimizer, twin, other = made(**options)
    for t in range(2):
        assert train(model, optimizer, [t]) == train(twin, other, [t])
        assert all(p.grad is None for p in model.parameters())
    assert not differing(snapshot(model, optimizer), snapshot(twin, other))
    assert torch.equal(optimizer.routing.scores, other.routing.scores)
    torch.testing.assert_close(optimizer.grad_norm.double(), other.grad_norm.double(), rtol=1e-6, atol=0)
    assert optimizer.routing.taken and optimizer.skipped_steps == 0


@pytest.mark.parametrize("in_backward", [True, False])
def test_stochastic_rounding_keeps_small_updates_and_repeats_itself(in_backward):
    runs = []
    for _ in range(2):
        model, *both = made(torch.bfloat16, lr=1e-4, bf16_update="stochastic")
        model, optimizer = (model, both[0]) if in_backward else both[1:]
        train(model, optimizer, 2)
        runs.append(snapshot(model, optimizer))
    assert not differing(*runs)
    start = mlp(torch.bfloat16).to(DEVICE).state_dict()
    assert any(not torch.equal(p, start[name]) for name, p in model.named_parameters())


def test_a_layer_with_a_bad_gradient_is_skipped_alone():
    model, optimizer, twin, other = made()
    spoil = model[4].weight.register_hook(lambda grad: grad * float("nan"))
    train(model, optimizer, 1)
    train(twin, other, 1)
    spoil.remove()
    assert optimizer.routing.taken and optimizer.routing.winners()["4"] == []
    assert optimizer.routing.winners()["1"] == other.routing.winners()["1"]
    assert optimizer.state[model[4].weight]["step"] == 0 and optimizer.state[model[1].weight]["step"] == 1
    assert torch.equal(model[4].weight, mlp(torch.float32).to(DEVICE)[4].weight)
    assert torch.equal(model[1].weight, twin[1].weight)
    (loss_of(model, 1) * float("nan")).backward()
    optimizer.step()
    assert not optimizer.routing.taken and optimizer.skipped_steps == 2
