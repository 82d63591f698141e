"""The fused step against the plain one, which is tested against the oracle."""

import copy
import io
import pickle
from contextlib import contextmanager

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from fused import CLOSE, DEVICE, TF32_CLOSE, TF32_TOLERANCE, assert_alike, assert_same_decision, quantizable, twins
from molf import MoLF
from molf.kernels import step as kernels
from molf.scores import get_score
from sharding import adapted
from small import differing, loss_of, mlp, snapshot, train, wide

RATES = {"lr": 1e-2, "lora_lr": 2e-2, "eps": 1e-4}


def step_both(pair, t):
    """Take the same step with both and return the experts that won somewhere."""
    for model, optimizer in pair:
        train(model, optimizer, [t])
    (_, plain), (_, fused) = pair
    assert_same_decision(plain, fused)
    return {expert for winners in fused.routing.winners().values() for expert in winners}


def trains(p):
    return p.requires_grad


def give_gradients(models, t, without=()):
    """Give all models the gradients of step ``t``, none to the parameters of those numbers."""
    generator = torch.Generator().manual_seed(t)
    for i, parameters in enumerate(zip(*(model.parameters() for model in models), strict=True)):
        grad = torch.randn(parameters[0].shape, generator=generator) * 0.1
        for p in parameters:
            p.grad = None if i in without or not p.requires_grad else grad.to(p, copy=True)


@pytest.mark.parametrize(
    ("score", "top_k", "max_grad_norm"),
    [("epd", 1, None), ("epd", 2, 0.05), ("pfn", 1, 0.05), ("pfn", 3, None), ("descent", 1, None), ("random", 1, None),
     ("coherence", 1, None), ("coherence", 2, 0.05), ("shuffled", 1, None)],
)  # fmt: skip
def test_fused_equals_plain(score, top_k, max_grad_norm):
    rate = {"lora_lr": "matched"} if score == "random" else {}  # another scale for every shape
    pair = twins(mlp(torch.float32), score=score, top_k=top_k, max_grad_norm=max_grad_norm, **rate)
    won = set().union(*(step_both(pair, t) for t in range(3)))
    assert len(won) > 1 or score == "pfn"  # by EPD both kinds of experts win
    assert_alike(*pair)


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str)
def another_default_dtype(request):
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("ranks", [(2, 4), None], ids=["merged", "adapted"])
def test_the_default_dtype_does_not_matter(ranks, another_default_dtype):
    pair = twins(mlp(torch.float32) if ranks else adapted(True, torch.float32), ranks=ranks, **RATES)
    give_gradients([model for model, _ in pair], 0)
    for _, optimizer in pair:
        optimizer.step()
    assert_same_decision(pair[0][1], pair[1][1])
    assert_alike(*pair, states=False)


def test_fused_equals_plain_in_tf32(tensor_cores, monkeypatch):
    """Both with the error of TF32. With a small eps, rounding would decide where elements of B without a gradient move."""
    if tensor_cores:
        monkeypatch.setattr("fused.TOLERANCE", TF32_TOLERANCE)
        monkeypatch.setattr("fused.CLOSE", TF32_CLOSE)
    pair = twins(mlp(torch.float32), eps=0.5)
    for t in range(2):
        step_both(pair, t)
    assert_alike(*pair)


@pytest.mark.parametrize(
    ("score", "top_k", "max_grad_norm"), [("epd", 1, 0.05), ("pfn", 3, None), ("coherence", 1, None)]
)
def test_8_bit_states(score, top_k, max_grad_norm):
    """Codes may differ by one where the last bit of a moment does; weights, whose steps use the exact ones, may not."""
    # With a small eps the first step of an element of B whose gradient is all but 0 is the sign of a rounding error.
    options = {"score": score, "top_k": top_k, "max_grad_norm": max_grad_norm, "eps": 1e-4, "lr": 1e-3, "lora_lr": 2e-3}
    pair = twins(wide(), optim_bits=8, **options)
    (plain, slow), (fused, fast) = pair
    won = set()
    for t in range(2):
        won |= step_both(pair, t)
        assert_alike(*pair)
        for p, q in zip(plain.parameters(), fused.parameters(), strict=True):
            for key, value in slow.state[p].items():
                if value.dtype == torch.uint8:
                    found = fast.state[q][key]
                    assert (found == value).double().mean() > 0.999
                    found.copy_(value)  # so that the next step starts alike
    assert len(won) > 1


def test_bf16_weights_with_low_parts():
    pair = (plain, slow), (fused, fast) = twins(mlp(torch.bfloat16), lr=1e-3)
    for t in range(3):
        for p, q in zip(plain.parameters(), fused.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t)).to(p)
            q.grad = p.grad.clone()
        for _, optimizer in pair:
            optimizer.step()
    for expert in ("fft", "lora_r2", "lora_r4"):
        a, b = slow.experts["1"][expert], fast.experts["1"][expert]
        for key in ("weight", "bias") if expert == "fft" else ("A", "B"):
            torch.testing.assert_close(getattr(b, key), getattr(a, key), rtol=1e-5, atol=1e-5)


def test_a_non_finite_gradient_skips_the_step_and_counts():
    pair = (_, slow), (model, fast) = twins(mlp(torch.float32))
    step_both(pair, 0)
    state = copy.deepcopy(fast.state_dict())
    for net, optimizer in pair:
        optimizer.zero_grad()
        loss_of(net, 1).backward()
        next(net.parameters()).grad[0, 0] = float("nan")
        optimizer.step()
    assert not fast.routing.taken
    step_both(pair, 2)
    assert fast.routing.taken and fast.skipped_steps == slow.skipped_steps == 1
    assert_alike(*pair)
    fast.load_state_dict(state)
    assert fast.skipped_steps == 0


def test_schedules_and_moved_parameters_are_followed():
    pair = twins(mlp(torch.float32))
    for t in range(3):
        for _, optimizer in pair:
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (t + 1)
        step_both(pair, t)
        for p in pair[1][0].parameters():
            p.data = p.data.clone()  # at another address
    assert_alike(*pair)


@pytest.mark.parametrize("tensor", [False, True])
def test_a_step_at_a_rate_of_zero_decides_alike(tensor):
    lr = torch.tensor(1e-2, device=DEVICE) if tensor else 1e-2
    pair = twins(mlp(torch.float32), **RATES | {"lr": lr})
    schedulers = [LambdaLR(optimizer, lambda t: t / 2) for _, optimizer in pair]
    before = [p.detach().clone() for p in pair[1][0].parameters()]
    for t in range(2):
        won = step_both(pair, t)
        assert len(won) > 1
        assert t or all(p.equal(q) for p, q in zip(pair[1][0].parameters(), before, strict=True))
        for scheduler in schedulers:
            scheduler.step()
    assert_alike(*pair)


def test_cycled_betas_are_followed_by_the_same_tables(monkeypatch):
    """As OneCycleLR does unasked, at every step."""
    made, prepared = [], kernels.Prepared
    monkeypatch.setattr(kernels, "Prepared", lambda *args: made.append(prepared(*args)) or made[-1])
    pair = twins(mlp(torch.float32), **RATES)
    schedulers = [OneCycleLR(optimizer, 1e-2, total_steps=6) for _, optimizer in pair]
    seen = set()
    for t in range(4):
        seen.add(pair[1][1].param_groups[0]["betas"])
        give_gradients([model for model, _ in pair], t)
        for (_, optimizer), scheduler in zip(pair, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        assert_same_decision(pair[0][1], pair[1][1])
        for _, optimizer in pair:
            for group in optimizer.param_groups:
                group["eps"] /= 2
    assert_alike(*pair)
    assert len(made) == 1 and len(seen) == 4
    pair[1][1].param_groups[0]["betas"] = (0.5, 0.9)
    give_gradients([pair[1][0]], 4)
    with pytest.raises(ValueError, match="one setting of betas and eps"):
        pair[1][1].step()


def test_a_saved_state_goes_on_in_either_step():
    pair = (plain, slow), (fused, fast) = twins(mlp(torch.float32))
    for t in range(2):
        step_both(pair, t)
    slow.load_state_dict(copy.deepcopy(fast.state_dict()))
    plain.load_state_dict(fused.state_dict())
    pickle.dumps(fast)  # without kernels and tables
    fast = MoLF(fused, ranks=(2, 4), lr=1e-2, lora_lr=2e-2, fused=True)
    fast.load_state_dict(copy.deepcopy(slow.state_dict()))
    pair = (plain, slow), (fused, fast)
    for t in range(2, 4):
        step_both(pair, t)
    assert_alike(*pair)


def test_score_top_k_and_clipping_may_change_between_steps():
    pair = twins(mlp(torch.float32))
    for t, (score, top_k, max_norm) in enumerate((("epd", 1, None), ("pfn", 3, 0.05), ("epd", 2, None))):
        for _, optimizer in pair:
            optimizer.score, optimizer.top_k, optimizer.max_grad_norm = get_score(score), top_k, max_norm
        step_both(pair, t)
        assert {len(won) for won in pair[1][1].routing.winners().values()} == {top_k}


def test_the_models_device_is_the_current_one_at_every_launch(monkeypatch):
    """Triton launches on the current device, which need not be the model's."""
    model, inside, launched = mlp(torch.float32).to(DEVICE), [], []

    @contextmanager
    def current(x):
        inside.append(x.device.type)
        yield
        inside.pop()

    def watch(launch):
        return lambda *args, **how: (launched.append(inside[-1]), launch(*args, **how))[1]

    monkeypatch.setattr(torch.cuda, "device_of", current)
    for name in ("pair_gradients", "launch"):
        monkeypatch.setattr(kernels, name, watch(getattr(kernels, name)))
    train(model, MoLF(model, ranks=(2,), fused=True), 1)
    assert len(launched) > 4 and set(launched) == {DEVICE} and not inside


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_another_device_than_the_current_one():
    model = mlp(torch.float32).to("cuda:1")
    optimizer = MoLF(model, ranks=(2,))
    train(model, optimizer, 1)
    assert optimizer.fused_in_use is True and all(p.isfinite().all() for p in model.parameters())


def test_layers_that_missed_steps_draw_no_noise_again(monkeypatch):
    """The seed is that of the most steps taken, so a layer without gradient does not repeat it."""
    torch.manual_seed(1)
    model, seeds = mlp(torch.bfloat16).to(DEVICE), []
    optimizer = MoLF(model, ranks=(2,), bf16_update="stochastic", fused=True)
    monkeypatch.setattr(kernels._Step, "_move_chunk", lambda step, chunk: seeds.append(int(step._noise)))
    for t in range(4):
        give_gradients((model,), t, (1, 2) if t % 2 else ())
        optimizer.step()
    assert len(set(seeds)) == 4


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize(("top_k", "lora_lr"), [(1, 2e-2), (2, 2e-2), (2, "matched")])
def test_adapters_as_experts(freeze, top_k, lora_lr):
    pair = twins(adapted(freeze, torch.float32), ranks=None, top_k=top_k, **{**RATES, "lora_lr": lora_lr})
    for t in range(4):
        give_gradients([model for model, _ in pair], t)
        given = [p.grad.clone() for p in filter(trains, pair[1][0].parameters())]
        for _, optimizer in pair:
            optimizer.step()
        assert_same_decision(pair[0][1], pair[1][1])
        assert all(p.grad.equal(grad) for p, grad in zip(filter(trains, pair[1][0].parameters()), given, strict=True))
    assert_alike(*pair, states=False)


def test_gradients_that_come_and_go():
    """Layers, biases and ordinary parameters have a gradient at one step and none at the next: no table is stale."""
    pair = twins(mlp(torch.float32), **RATES)
    count = len(list(pair[0][0].parameters()))
    for t, without in enumerate([(), (1, 2), (0,), (1, 2, count - 1), (), (3,), (1, 2)]):
        give_gradients([model for model, _ in pair], t, without)
        for _, optimizer in pair:
            optimizer.step()
        assert_same_decision(pair[0][1], pair[1][1])
    assert_alike(*pair, states=False)


@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
def test_a_loss_scale_and_an_overflow(max_grad_norm):
    """As from a GradScaler: gradients 128 times too large, then a step with an overflow."""
    pair = (_, slow), (_, fast) = twins(mlp(torch.float32), max_grad_norm=max_grad_norm, **RATES)
    for t, overflow in enumerate([0.0, 1.0, 0.0]):
        give_gradients([model for model, _ in pair], t)
        for model, optimizer in pair:
            for p in model.parameters():
                p.grad *= 128
            optimizer.grad_scale = torch.tensor(128.0, device=DEVICE)
            optimizer.found_inf = torch.tensor(overflow, device=DEVICE)
            optimizer.step()
        torch.testing.assert_close(fast.grad_norm.cpu().double(), slow.grad_norm.cpu().double(), **CLOSE)
    assert_alike(*pair, states=False)
    assert slow.skipped_steps == fast.skipped_steps == 1


@pytest.mark.parametrize(
    ("make", "dtype", "options"),
    [
        (mlp, torch.bfloat16, {"bf16_update": "stochastic"}),
        (mlp, torch.bfloat16, {}),
        (quantizable, torch.float32, {"optim_bits": 8}),
    ],
    ids=["stochastic", "split", "8 bits"],
)
def test_interrupted_and_resumed_is_uninterrupted(make, dtype, options):
    def begun():
        torch.manual_seed(2)
        model = make(dtype).to(DEVICE)
        return model, MoLF(model, ranks=(2,), fused=True, **RATES, **options)

    model, optimizer = begun()
    for t in range(3):
        if t == 1:
            file = io.BytesIO()
            torch.save((model.state_dict(), optimizer.state_dict()), file)
        give_gradients((model,), t)
        optimizer.step()
    file.seek(0)
    resumed, other = begun()
    for loaded, state in zip((resumed, other), torch.load(file, weights_only=True), strict=True):
        loaded.load_state_dict(state)
    for t in (1, 2):
        give_gradients((resumed,), t)
        other.step()
    assert not differing(snapshot(model, optimizer), snapshot(resumed, other))
