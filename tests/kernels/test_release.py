"""Gradient release by the kernels, layer by layer, against their step of the whole model: the same bits."""

import copy

import pytest
import torch

from molf import MoLF
from small import differing, loss_of, mlp, snapshot, train, wide

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pair_of(dtype=torch.float32, **options):
    model = (wide if "optim_bits" in options else mlp)(dtype).to(DEVICE)
    twin, made = copy.deepcopy(model), []
    options = {"ranks": (2, 4), "lr": 1e-2, "lora_lr": 2e-2, "fused": True, **options}
    for m, released in ((model, True), (twin, False)):
        torch.manual_seed(1)
        made.append(MoLF(m, optimizer_in_backward=released, **options))
    return model, made[0], twin, made[1]


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float32, {"score": "pfn", "top_k": 2}),
        (torch.bfloat16, {}),
        (torch.float32, {"optim_bits": 8}),
    ],
    ids=["epd", "pfn", "bf16 split", "8 bits"],
)
def test_layer_by_layer_is_the_whole_step(dtype, options):
    model, optimizer, twin, other = pair_of(dtype, **options)
    for t in range(3):
        assert train(model, optimizer, range(t, t + 1)) == train(twin, other, range(t, t + 1))
        assert all(p.grad is None for p in model.parameters())
    assert not differing(snapshot(model, optimizer), snapshot(twin, other))
    assert torch.equal(optimizer.routing.scores, other.routing.scores)
    torch.testing.assert_close(optimizer.grad_norm.double(), other.grad_norm.double(), rtol=1e-6, atol=0)
    assert optimizer.routing.taken and optimizer.skipped_steps == 0


def test_stochastic_rounding_repeats_itself():
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model, optimizer, _, _ = pair_of(torch.bfloat16, lr=1e-4, bf16_update="stochastic")
        train(model, optimizer, 3)
        runs.append(snapshot(model, optimizer))
    assert not differing(*runs)
    start = mlp(torch.bfloat16).to(DEVICE).state_dict()
    assert any(not torch.equal(p, start[name]) for name, p in model.named_parameters())


def test_a_layer_with_a_bad_gradient_is_left_out_alone():
    model, optimizer, twin, other = pair_of()
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
    assert not optimizer.routing.taken
    assert optimizer.skipped_steps == 2
