import copy
import logging
import random

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from conftest import TOLERANCE
from dispatch_modes import Launches
from molf import MoLF
from molf.numerics.gradients import total_norm
from sharding import adapted
from small import (
    assert_equals_twin,
    assert_same_bits,
    differing,
    explicit_adamw,
    explicit_twin,
    loss_of,
    mlp,
    snapshot,
    train,
    wide,
)


def pair_of(model, **options):
    """The same optimizer twice, on the model and on a copy."""
    twin = copy.deepcopy(model)
    made = []
    for m in (model, twin):
        torch.manual_seed(1)
        made.append(MoLF(m, **{"ranks": (2,), "lr": 1e-3, "lora_lr": 3e-3, **options}))
    return twin, *made


def norm_of(model):
    return torch.stack([p.grad.double().norm() for p in model.parameters()]).norm().item()


@pytest.mark.parametrize("ranks", [(2,), (1, 3), ()], ids=str)
@pytest.mark.parametrize("max_grad_norm", [1e-3, 0.3, 1e6])
def test_clipping_counts_the_gradients_of_all_experts(ranks, max_grad_norm):
    model = mlp()
    optimizer = MoLF(model, ranks=ranks, top_k=len(ranks) + 1, lr=1e-3, lora_lr=3e-3, max_grad_norm=max_grad_norm)
    twin = explicit_twin(model, optimizer)
    adamw = explicit_adamw(twin, lr=1e-3, lora_lr=3e-3)
    for t in range(8):
        train(model, optimizer, range(t, t + 1))
        adamw.zero_grad()
        loss_of(twin, t).backward()
        norm = clip_grad_norm_(twin.parameters(), max_grad_norm)
        adamw.step()
        assert optimizer.grad_norm.shape == ()
        assert optimizer.grad_norm.item() == pytest.approx(norm.item(), rel=1e-10)
    assert_equals_twin(model, optimizer, twin, TOLERANCE[torch.float64])


def test_norms_of_bf16_gradients_are_rounded_where_pytorchs_clipping_rounds_them():
    """Once for each tensor; PyTorch rounds the norm of all again."""
    model = mlp(torch.bfloat16)
    loss_of(model, 0).backward()
    norm = total_norm([p.grad for p in model.parameters()])
    assert norm == torch.stack([p.grad.norm().double() for p in model.parameters()]).norm()
    assert clip_grad_norm_(model.parameters(), 1.0) == norm.bfloat16()


def test_clipping_of_bf16_gradients():
    model = mlp(torch.bfloat16)
    train(model, MoLF(model, ranks=(), max_grad_norm=0.01), 1)
    assert norm_of(model) == pytest.approx(0.01, rel=5e-3)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gradients_below_the_norm_are_untouched(dtype):
    model = mlp(dtype)
    twin, clipped, free = pair_of(model)
    clipped.max_grad_norm = 1e6
    assert train(model, clipped, 3) == train(twin, free, 3)
    assert_same_bits(model, clipped, twin, free)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_norm_without_clipping_is_that_of_the_models_gradients(dtype):
    model = mlp(dtype)
    optimizer = MoLF(model, ranks=(2,))
    assert optimizer.grad_norm is None
    train(model, optimizer, 1)
    assert optimizer.grad_norm.item() == pytest.approx(norm_of(model), rel=5e-3 if dtype == torch.bfloat16 else 1e-6)


def test_no_gradient_at_all_changes_nothing():
    model = mlp()
    optimizer = MoLF(model, ranks=(2,), max_grad_norm=1.0)
    train(model, optimizer, 1)
    before, routing = snapshot(model, optimizer), optimizer.routing
    optimizer.zero_grad()
    optimizer.step()
    assert not differing(before, snapshot(model, optimizer))
    assert optimizer.routing is routing and optimizer.skipped_steps == 0


SPOILT = {"embedding": "0.weight", "weight": "1.weight", "bias": "1.bias", "norm": "3.bias", "last": "5.weight"}


@pytest.mark.parametrize("spoilt", SPOILT.values(), ids=SPOILT.keys())
@pytest.mark.parametrize(("value", "max_grad_norm"), [("nan", None), ("inf", 0.5), ("-inf", None)])
@pytest.mark.parametrize("first", [True, False], ids=["first step", "later"])
def test_a_step_with_a_bad_gradient_is_skipped_whole(value, spoilt, max_grad_norm, first, caplog):
    model = mlp(torch.float32)
    twin, optimizer, other = pair_of(model, max_grad_norm=max_grad_norm)
    done = 0 if first else 3
    train(model, optimizer, done)
    train(twin, other, done)
    weights, routing = [p.detach().clone() for p in model.parameters()], optimizer.routing
    before = None if first else snapshot(model, optimizer)

    optimizer.zero_grad()
    loss_of(model, 50).backward()
    model.get_parameter(spoilt).grad.view(-1)[-1] = float(value)
    with caplog.at_level(logging.WARNING, logger="molf"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))
    assert before is None or not differing(before, snapshot(model, optimizer))
    assert optimizer.routing is routing
    assert not optimizer.grad_norm.isfinite()
    assert optimizer.skipped_steps == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "not finite" in caplog.text

    assert train(model, optimizer, range(3, 6)) == train(twin, other, range(3, 6))
    assert_same_bits(model, optimizer, twin, other)
    assert (optimizer.skipped_steps, other.skipped_steps) == (1, 0)


FORMS = {
    "merged": (lambda: mlp(torch.float32), {}),
    "merged, clipped": (lambda: mlp(torch.float32), {"max_grad_norm": 0.1}),
    "merged, bf16 weights": (lambda: mlp(torch.bfloat16), {}),
    "merged, bf16 weights rounded stochastically": (lambda: mlp(torch.bfloat16), {"bf16_update": "stochastic"}),
    "merged, 8-bit moments": (wide, {"optim_bits": 8}),
    "branched": (lambda: adapted(freeze=True, dtype=torch.float32), {"ranks": None}),
    "branched, base trained": (lambda: adapted(freeze=False, dtype=torch.float32), {"ranks": None}),
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("form", FORMS)
def test_bad_gradients_at_random_steps_are_batches_never_seen(form, seed):
    """All weights and states end, bit for bit, where they end without those batches."""
    rng = random.Random(f"{form} {seed}")
    bad = rng.sample(range(12), 4)
    make, options = FORMS[form]
    model = make()
    twin, optimizer, other = pair_of(model, **options)
    for t in range(12):
        optimizer.zero_grad()
        loss_of(model, t).backward()
        if t in bad:
            spoilt = rng.choice([p for p in model.parameters() if p.grad is not None])
            spoilt.grad.view(-1)[rng.randrange(spoilt.numel())] = float(rng.choice(["nan", "inf", "-inf"]))
        optimizer.step()
        if t not in bad:
            train(twin, other, [t])
        for group in (*optimizer.param_groups, *other.param_groups):
            group["lr"] *= 0.9
    assert_same_bits(model, optimizer, twin, other)
    assert (optimizer.skipped_steps, other.skipped_steps) == (4, 0)


def test_every_skipped_step_counts_and_is_logged(caplog):
    model = mlp()
    optimizer = MoLF(model, ranks=(2,))
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.full_like(p, float("inf"))
        optimizer.step()
    assert optimizer.skipped_steps == 3
    assert len(caplog.records) == 3 and "3 skipped so far" in caplog.records[-1].getMessage()
    fresh = MoLF(mlp(), ranks=(2,))
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.skipped_steps == 3


@pytest.mark.parametrize("in_backward", [False, True])
def test_finite_gradients_whose_norm_overflows_are_finite(in_backward):
    model = mlp(torch.float32)
    optimizer = MoLF(model, ranks=(2,), optimizer_in_backward=in_backward)
    weights = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e19)
    numel = sum(p.numel() for p in model.parameters())
    optimizer.step()
    assert optimizer.skipped_steps == 0 and optimizer.grad_norm.item() == pytest.approx(1e19 * numel**0.5)
    for p, before in zip(model.parameters(), weights, strict=True):
        assert p.isfinite().all() and (p.ndim < 2 or not p.equal(before))  # biases belong to one expert


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e19, 1e25, 1e33])
def test_gradients_of_any_size_are_clipped(size, dtype):
    model = mlp(dtype)
    twin, optimizer, other = pair_of(model, max_grad_norm=1.0, bf16_update="stochastic")
    for m, o, factor in ((model, optimizer, size), (twin, other, 1.0)):
        for t in range(2):
            o.zero_grad()
            loss_of(m, t).backward()
            for p in m.parameters():
                p.grad.mul_(1e4 * factor)
            o.step()
    assert optimizer.skipped_steps == 0 and optimizer.routing.winners() == other.routing.winners()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-2)


def test_without_clipping_a_gradient_too_large_to_square_is_skipped(caplog):
    model = mlp(torch.float32)
    optimizer = MoLF(model, ranks=(2,))
    train(model, optimizer, 1)
    before = snapshot(model, optimizer)
    model[1].weight.grad[0, 0] = 1e20
    optimizer.step()
    assert not differing(before, snapshot(model, optimizer)) and "or its square, is not finite" in caplog.text


def scaled_step(model, optimizer, scaler, t, unscale=False, spoil=False, loss=None):
    optimizer.zero_grad()
    scaler.scale(loss_of(model, t) if loss is None else loss).backward()
    if spoil:
        model[1].weight.grad[0, 0] = float("inf")
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("unscale", [False, True], ids=["plain", "unscale_ before"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.3])
def test_loss_scale_of_a_power_of_two_changes_no_bit(unscale, max_grad_norm):
    model = mlp(torch.float32)
    twin, optimizer, other = pair_of(model, max_grad_norm=max_grad_norm)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=3)
    for t in range(8):
        scaled_step(model, optimizer, scaler, t, unscale)
    train(twin, other, 8)
    assert scaler.get_scale() > 2.0**12
    assert optimizer.grad_norm.item() == other.grad_norm.item()
    assert_same_bits(model, optimizer, twin, other)


@pytest.mark.parametrize("unscale", [False, True], ids=["plain", "unscale_ before"])
def test_overflow_skips_the_step_and_counts(unscale):
    model = mlp(torch.float32)
    twin, optimizer, other = pair_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaled_step(model, optimizer, scaler, 0, unscale)
    scaled_step(model, optimizer, scaler, 1, unscale, spoil=True)
    assert scaler.get_scale() == 2.0**11
    scaled_step(model, optimizer, scaler, 2, unscale)
    train(twin, other, [0, 2])
    assert optimizer.skipped_steps == 1
    assert_same_bits(model, optimizer, twin, other)


def test_half_precision_autocast_with_a_loss_scale():
    """With the gradients of the same float16 passes, no ranks is AdamW."""
    model = mlp(torch.float32)
    twin = copy.deepcopy(model)
    vectors, matrices = ([p for p in twin.parameters() if (p.ndim < 2) is vector] for vector in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    for m, optimizer in ((model, MoLF(model, ranks=(), lr=1e-3)), (twin, torch.optim.AdamW(groups, 1e-3))):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for t in range(6):
            with torch.autocast("cpu", dtype=torch.float16):
                loss = loss_of(m, t)
            scaled_step(m, optimizer, scaler, t, loss=loss)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=TOLERANCE[torch.float32])


def test_loss_scale_is_divided_out_in_full_precision():
    """A scale whose reciprocal bf16 cannot hold, with a bf16 gradient first."""
    model = mlp(torch.float32)
    model[0].bfloat16()
    optimizer = MoLF(model, ranks=(2,))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(3.0), torch.tensor(0.0)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    expected = [(p.grad.double() / 3).to(p.dtype) for p in model.parameters()]
    optimizer.step()
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-2 if p.dtype == torch.bfloat16 else 1e-6, atol=0)


@pytest.mark.parametrize("lr", [1e-3, 0.0])
def test_sparse_gradients(lr):
    model = nn.Sequential(nn.Embedding(5, 6, sparse=True), nn.Linear(6, 5))
    optimizer = MoLF(model, ranks=(2,), lr=lr)
    for _ in range(2):  # without state, and with it
        optimizer.zero_grad()
        model(torch.tensor([1])).sum().backward()
        with pytest.raises(ValueError, match=r"gradient of 0\.weight is sparse.*sparse=False"):
            optimizer.step()
        optimizer.zero_grad()
        model(torch.tensor([1])).sum().backward()
        model[0].weight.grad = model[0].weight.grad.to_dense()
        optimizer.step()


def test_the_norm_of_many_gradients_takes_as_few_launches_as_that_of_two():
    counts = []
    for n in (1, 50):
        grads = [torch.full((4,), 0.5).to(dtype) for dtype in (torch.float32, torch.bfloat16) for _ in range(n)]
        with Launches() as launches:
            norm = total_norm(grads)
        assert norm.dtype == torch.float64 and norm.item() == (2 * n) ** 0.5
        counts.append(launches.count)
    assert counts[0] == counts[1]
