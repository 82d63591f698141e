"""The fused step against the plain one, which is tested against the oracle."""

import copy
import pickle
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from fused import CLOSE, DEVICE, TOLERANCE
from molf import MoLF
from molf.kernels import step as kernels
from molf.scores import get_score
from small import differing, loss_of, mlp, snapshot, wide


def twins(dtype=torch.float32, make=mlp, **options):
    """Two copies of a small model, one with a plain and one with a fused optimizer."""
    torch.manual_seed(0)
    plain = make(dtype).to(DEVICE)
    fused = copy.deepcopy(plain)
    options = {"ranks": (2, 4), "lr": 1e-2, "lora_lr": 2e-2, **options}
    torch.manual_seed(0)
    slow = MoLF(plain, fused=False, **options)
    torch.manual_seed(0)
    return plain, slow, fused, MoLF(fused, fused=True, **options)


def step(model, optimizer, t):
    optimizer.zero_grad()
    loss_of(model, t).backward()
    optimizer.step()


def assert_alike(plain, slow, fused, fast, tolerance):
    for (name, p), q in zip(plain.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(q, p, **tolerance, msg=lambda m, name=name: f"{name}: {m}")
    for p, q in zip(plain.parameters(), fused.parameters(), strict=True):
        for key, value in slow.state[p].items():
            if key != "low":
                torch.testing.assert_close(fast.state[q][key].cpu(), value.cpu(), **tolerance)


@pytest.mark.parametrize(
    ("score", "top_k", "max_grad_norm"), [("epd", 1, None), ("epd", 2, 0.05), ("pfn", 1, 0.05), ("pfn", 3, None)]
)
def test_fused_equals_plain(score, top_k, max_grad_norm):
    plain, slow, fused, fast = twins(score=score, top_k=top_k, max_grad_norm=max_grad_norm)
    won = set()
    for t in range(5):
        step(plain, slow, t)
        step(fused, fast, t)
        assert fast.routing.winners() == slow.routing.winners()
        torch.testing.assert_close(fast.routing.scores.cpu(), slow.routing.scores.cpu(), **CLOSE)
        torch.testing.assert_close(fast.grad_norm.cpu().double(), slow.grad_norm.cpu().double(), **CLOSE)
        won |= {expert for winners in fast.routing.winners().values() for expert in winners}
    assert len(won) > 1 or score == "pfn"  # by EPD both kinds of step were taken
    assert_alike(plain, slow, fused, fast, TOLERANCE)


@pytest.mark.parametrize(("score", "top_k", "max_grad_norm"), [("epd", 1, 0.05), ("pfn", 3, None)])
def test_8_bit_states(score, top_k, max_grad_norm):
    """Codes may differ by one where the last bit of a moment does; weights, whose steps take the exact ones, may not."""
    # With a small eps the first step of an element of B whose gradient is all but 0 is the sign of a rounding error.
    options = {"score": score, "top_k": top_k, "max_grad_norm": max_grad_norm, "eps": 1e-4, "lr": 1e-3, "lora_lr": 2e-3}
    plain, slow, fused, fast = twins(make=wide, optim_bits=8, **options)
    won = set()
    for t in range(2):
        step(plain, slow, t)
        step(fused, fast, t)
        assert fast.routing.winners() == slow.routing.winners()
        torch.testing.assert_close(fast.routing.scores.cpu(), slow.routing.scores.cpu(), **CLOSE)
        won |= {expert for winners in fast.routing.winners().values() for expert in winners}
        for p, q in zip(plain.parameters(), fused.parameters(), strict=True):
            torch.testing.assert_close(q, p, **TOLERANCE)
            for key, value in slow.state[p].items():
                if value.dtype == torch.uint8:
                    found = fast.state[q][key]
                    assert (found == value).double().mean() > 0.999
                    found.copy_(value)  # so that the next step starts alike
                else:
                    torch.testing.assert_close(fast.state[q][key].cpu(), value.cpu(), **TOLERANCE)
    assert len(won) > 1


def test_8_bit_states_moved_inside_backward():
    """Layer by layer or all at once: the same bits."""
    ends = []
    for inside in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(300, 20), nn.Linear(20, 3)).to(DEVICE)
        optimizer = MoLF(model, ranks=(2,), lr=1e-2, fused=True, optim_bits=8, optimizer_in_backward=inside)
        for _ in range(2):
            model(torch.randn(4, 300, device=DEVICE)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(snapshot(model, optimizer))
    assert not differing(*ends) and any(x.dtype == torch.uint8 for x in ends[0].values())


def test_bf16_weights_with_low_parts():
    plain, slow, fused, fast = twins(torch.bfloat16, lr=1e-3)
    for t in range(5):
        for p, q in zip(plain.parameters(), fused.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t)).to(p)
            q.grad = p.grad.clone()
        slow.step()
        fast.step()
    for expert in ("fft", "lora_r2", "lora_r4"):
        a, b = slow.experts["1"][expert], fast.experts["1"][expert]
        for key in ("weight", "bias") if expert == "fft" else ("A", "B"):
            torch.testing.assert_close(getattr(b, key), getattr(a, key), rtol=1e-5, atol=1e-5)


def test_stochastic_rounding_keeps_small_updates_and_repeats_itself():
    def trained():
        torch.manual_seed(1)
        model = mlp(torch.bfloat16).to(DEVICE)
        optimizer = MoLF(model, ranks=(2,), lr=1e-4, bf16_update="stochastic", fused=True)
        for t in range(3):
            step(model, optimizer, t)
        return model

    first, second = trained(), trained()
    start = mlp(torch.bfloat16).to(DEVICE)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    assert any(not torch.equal(p, q) for p, q in zip(first.parameters(), start.parameters(), strict=True))


def test_experts_can_be_set_beside_stochastic_rounding():
    model = mlp(torch.bfloat16).to(DEVICE)
    optimizer = MoLF(model, ranks=(2,), bf16_update="stochastic", fused=True)
    before = model[1].weight.detach().clone()
    optimizer.experts["1"]["lora_r2"].assign(B=torch.ones(13, 2))
    assert not torch.equal(model[1].weight, before)


def test_a_step_with_a_non_finite_gradient_is_left_out_and_counted():
    plain, slow, fused, fast = twins()
    step(plain, slow, 0)
    step(fused, fast, 0)
    for model, optimizer in ((plain, slow), (fused, fast)):
        optimizer.zero_grad()
        loss_of(model, 1).backward()
        next(model.parameters()).grad[0, 0] = float("nan")
        optimizer.step()
    assert not fast.routing.taken
    step(plain, slow, 2)
    step(fused, fast, 2)
    assert fast.routing.taken and fast.skipped_steps == slow.skipped_steps == 1
    assert_alike(plain, slow, fused, fast, TOLERANCE)


def test_loading_a_state_brings_its_count_of_steps_left_out():
    _, _, model, optimizer = twins()
    step(model, optimizer, 0)
    state = copy.deepcopy(optimizer.state_dict())
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step()
    optimizer.load_state_dict(state)
    assert optimizer.skipped_steps == 0


def test_schedules_and_moved_gradients_are_followed():
    plain, slow, fused, fast = twins()
    for t in range(4):
        for optimizer in (slow, fast):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (t + 1)
        step(plain, slow, t)
        step(fused, fast, t)
        for p in fused.parameters():
            p.data = p.data.clone()  # at another address
    assert_alike(plain, slow, fused, fast, TOLERANCE)


def test_a_saved_state_goes_on_in_either_step():
    plain, slow, fused, fast = twins()
    for t in range(2):
        step(plain, slow, t)
        step(fused, fast, t)
    slow.load_state_dict(copy.deepcopy(fast.state_dict()))
    plain.load_state_dict(fused.state_dict())
    pickle.dumps(fast)  # kernels and their tables stay behind
    fast = MoLF(fused, ranks=(2, 4), lr=1e-2, lora_lr=2e-2, fused=True)
    fast.load_state_dict(copy.deepcopy(slow.state_dict()))
    for t in range(2, 4):
        step(plain, slow, t)
        step(fused, fast, t)
    assert_alike(plain, slow, fused, fast, TOLERANCE)


def test_settings_are_those_of_the_moment():
    """Score, top-k and clipping may change between steps, as in the plain step."""
    plain, slow, fused, fast = twins()
    for t, (score, top_k, most) in enumerate((("epd", 1, None), ("pfn", 3, 0.05), ("epd", 2, None))):
        for optimizer in (slow, fast):
            optimizer.score, optimizer.top_k, optimizer.max_grad_norm = get_score(score), top_k, most
        step(plain, slow, t)
        step(fused, fast, t)
        assert fast.routing.winners() == slow.routing.winners()
        assert {len(won) for won in fast.routing.winners().values()} == {top_k}
        torch.testing.assert_close(fast.routing.scores.cpu(), slow.routing.scores.cpu(), **CLOSE)


def test_the_device_of_the_model_is_the_current_one_at_every_launch(monkeypatch):
    """Triton launches on the current device, which need not be the model's."""
    model, inside, launched = mlp(torch.float32).to(DEVICE), [], []

    @contextmanager
    def current(x):
        inside.append(x.device.type)
        yield
        inside.pop()

    def watch(launch):
        return lambda *args: (launched.append(inside[-1]), launch(*args))[1]

    monkeypatch.setattr(torch.cuda, "device_of", current)
    for name in ("pair_gradients", "update_moments_", "move_winners_", "update_merged_weights_", "requantize_"):
        monkeypatch.setattr(kernels, name, watch(getattr(kernels, name)))
    step(model, MoLF(model, ranks=(2,), fused=True), 0)
    assert launched == [DEVICE] * 6 and not inside


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_another_device_than_the_current_one():
    model = mlp(torch.float32).to("cuda:1")
    optimizer = MoLF(model, ranks=(2,))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.fused_in_use is True and all(p.isfinite().all() for p in model.parameters())


def test_layers_that_missed_steps_draw_no_noise_again(monkeypatch):
    """The seed is that of the most steps taken, so whose gradient is missing does not repeat it."""
    torch.manual_seed(1)
    model, seeds = mlp(torch.bfloat16).to(DEVICE), []
    optimizer = MoLF(model, ranks=(2,), bf16_update="stochastic", fused=True)
    monkeypatch.setattr(kernels, "update_merged_weights_", lambda *args: seeds.append(int(args[-1])))
    for t in range(4):
        optimizer.zero_grad()
        loss_of(model, t).backward()
        if t % 2:
            model[1].weight.grad = model[1].bias.grad = None
        optimizer.step()
    assert len(set(seeds)) == 4
