"""Fused and plain steps side by side where what there is to do changes: adapters, missing gradients, loss scales, resuming."""

import copy
import io

import pytest
import torch

from fused import CLOSE, DEVICE, TOLERANCE
from molf import MoLF
from ranks import adapted
from small import differing, mlp, snapshot, wide

RATES = {"lr": 1e-2, "lora_lr": 2e-2, "eps": 1e-4}


def pair(model, **options):
    """The model and a copy of it, with a plain and a fused optimizer."""
    made = []
    for own, fused in ((model.to(DEVICE), False), (copy.deepcopy(model).to(DEVICE), True)):
        torch.manual_seed(0)
        made.append((own, MoLF(own, fused=fused, **{**RATES, **options})))
    return made


def give_gradients(models, t, without=()):
    """Give all models the gradients of step ``t``, none to the parameters of those numbers."""
    generator = torch.Generator().manual_seed(t)
    for i, parameters in enumerate(zip(*(model.parameters() for model in models), strict=True)):
        grad = torch.randn(parameters[0].shape, generator=generator) * 0.1
        for p in parameters:
            p.grad = None if i in without or not p.requires_grad else grad.to(p, copy=True)


def assert_alike(plain, fused):
    for (name, p), q in zip(plain[0].named_parameters(), fused[0].parameters(), strict=True):
        torch.testing.assert_close(q, p, **TOLERANCE, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
def test_adapters_as_experts(freeze, top_k):
    plain, fused = pair(adapted(freeze, torch.float32), top_k=top_k)
    for t in range(4):
        give_gradients((plain[0], fused[0]), t)
        plain[1].step()
        fused[1].step()
        assert fused[1].routing.winners() == plain[1].routing.winners()
        torch.testing.assert_close(fused[1].routing.scores.cpu(), plain[1].routing.scores.cpu(), **CLOSE)
    assert_alike(plain, fused)


def test_gradients_that_come_and_go():
    """Layers, biases and ordinary parameters are there at one step and not at the next: no table is a stale one."""
    plain, fused = pair(mlp(torch.float32), ranks=(2, 4))
    count = len(list(plain[0].parameters()))
    for t, without in enumerate([(), (1, 2), (0,), (1, 2, count - 1), (), (3,), (1, 2)]):
        give_gradients((plain[0], fused[0]), t, without)
        plain[1].step()
        fused[1].step()
        assert fused[1].routing.winners() == plain[1].routing.winners()
    assert_alike(plain, fused)


@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
def test_a_loss_scale_and_an_overflow(max_grad_norm):
    """What a GradScaler hands over: gradients 128 times too large, then a step that it found to overflow."""
    plain, fused = pair(mlp(torch.float32), ranks=(2, 4), max_grad_norm=max_grad_norm)
    for t, overflow in enumerate([0.0, 1.0, 0.0]):
        give_gradients((plain[0], fused[0]), t)
        for model, optimizer in (plain, fused):
            for p in model.parameters():
                p.grad *= 128
            optimizer.grad_scale = torch.tensor(128.0, device=DEVICE)
            optimizer.found_inf = torch.tensor(overflow, device=DEVICE)
            optimizer.step()
        torch.testing.assert_close(fused[1].grad_norm.cpu().double(), plain[1].grad_norm.cpu().double(), **CLOSE)
    assert_alike(plain, fused)
    assert plain[1].skipped_steps == fused[1].skipped_steps == 1


@pytest.mark.parametrize(
    ("make", "dtype", "options"),
    [
        (mlp, torch.bfloat16, {"bf16_update": "stochastic"}),
        (mlp, torch.bfloat16, {}),
        (wide, torch.float32, {"optim_bits": 8}),
    ],
    ids=["stochastic", "split", "8 bits"],
)
def test_interrupted_and_resumed_is_uninterrupted(make, dtype, options):
    def begun():
        torch.manual_seed(2)
        model = make(dtype).to(DEVICE)
        return model, MoLF(model, ranks=(2,), fused=True, **RATES, **options)

    model, optimizer = begun()
    for t in range(4):
        if t == 2:
            file = io.BytesIO()
            torch.save((model.state_dict(), optimizer.state_dict()), file)
        give_gradients((model,), t)
        optimizer.step()
    file.seek(0)
    again, resumed = begun()
    weights, state = torch.load(file, weights_only=True)
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    for t in (2, 3):
        give_gradients((again,), t)
        resumed.step()
    assert not differing(snapshot(model, optimizer), snapshot(again, resumed))
