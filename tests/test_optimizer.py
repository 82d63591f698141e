import copy
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, SequentialLR

import molf
from conftest import TOLERANCE
from molf import MoLF, param_groups
from molf.scores import EPD
from small import Prefer, differing, loss_of, mlp, snapshot, tiny_llama, train


def built(dtype=torch.float64, **options):
    model = mlp(dtype)
    torch.manual_seed(1)
    return model, MoLF(model, **{"ranks": (2, 3), "lr": 1e-2, "lora_lr": 2e-2, **options})


def assert_identical(model, optimizer, twin, other):
    assert not differing(snapshot(model, optimizer), snapshot(twin, other))


def zero_gradients(model):
    for p in model.parameters():
        p.grad = torch.zeros_like(p)


# --- the decision -----------------------------------------------------------------------------------------------------


def test_routing_tells_what_was_decided():
    model, optimizer = built(top_k=2)
    train(model, optimizer, 2)
    routing = optimizer.routing
    assert isinstance(routing, molf.Routing)
    assert (routing.modules, routing.experts) == (("1", "4", "5"), ("fft", "lora_r2", "lora_r3"))
    assert routing.scores.shape == routing.chosen.shape == (3, 3)
    assert (routing.scores.dtype, routing.chosen.dtype) == (torch.float64, torch.bool)
    assert routing.chosen.sum(dim=1).tolist() == [2, 2, 2]
    assert all(len(names) == 2 for names in routing.winners().values())


@pytest.mark.parametrize("score", ["epd", "pfn"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_zero_gradients_are_a_tie_for_the_earlier_experts(score, top_k):
    model, optimizer = built(score=score, top_k=top_k)
    zero_gradients(model)
    optimizer.step()
    assert set(map(tuple, optimizer.routing.winners().values())) == {("fft", "lora_r2")[:top_k]}


class AllAlike(EPD):
    name = "all_alike"

    def finish(self, total, n, lr):
        return torch.ones_like(total)


@pytest.mark.parametrize("top_k", [1, 2])
def test_equal_scores_are_a_tie_for_the_earlier_experts(top_k):
    model, optimizer = built(score=AllAlike(), top_k=top_k)
    for winners in train(model, optimizer, 3):
        assert set(map(tuple, winners.values())) == {("fft", "lora_r2")[:top_k]}


@pytest.mark.parametrize(("column", "winner"), list(enumerate(["fft", "lora_r2", "lora_r3"])))
def test_own_score(column, winner):
    model, optimizer = built(score=Prefer(column))
    assert train(model, optimizer, 2) == [{name: [winner] for name in "145"}] * 2


class Inspecting(EPD):
    """EPD by the slow way, remembering what it was given."""

    name = "inspecting"

    def partial(self, m, v, u, eps):
        return self.term(m, v, eps).sum()

    def finish(self, total, n, lr):
        self.n, self.lr = n, lr
        return super().finish(total, n, lr)


def test_a_score_sees_sizes_and_scheduled_rates():
    model, optimizer = built(score=Inspecting())
    twin, other = built()
    for m, o in ((model, optimizer), (twin, other)):
        train(m, o, 3, LambdaLR(o, lambda t: 0.5**t))
    assert optimizer.score.n.tolist() == [[104, 40, 60], [65, 36, 54], [18, 16, 24]]
    torch.testing.assert_close(optimizer.score.lr, torch.tensor([[1e-2, 2e-2, 2e-2]] * 3).double() / 4)
    torch.testing.assert_close(optimizer.routing.scores, other.routing.scores, rtol=1e-10, atol=0)


# --- rates ------------------------------------------------------------------------------------------------------------

SCHEDULES = {
    "lambda": lambda o: LambdaLR(o, lambda t: min(1.0, t / 3) * 0.9**t),
    "cosine": lambda o: CosineAnnealingLR(o, 8),
    "sequential": lambda o: SequentialLR(o, [LinearLR(o, 0.1, total_iters=3), CosineAnnealingLR(o, 5)], [3]),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_a_tensor_rate_is_a_rate(schedule):
    model, optimizer = built()
    twin, other = built(lr=torch.tensor(1e-2, dtype=torch.float64))
    assert train(model, optimizer, 8, schedule(optimizer)) == train(twin, other, 8, schedule(other))
    assert isinstance(other.param_groups[0]["lr"], torch.Tensor)
    assert_identical(model, optimizer, twin, other)


def test_rates_changed_by_hand_are_a_schedule():
    model, optimizer = built()
    twin, other = built()
    scheduler = LambdaLR(optimizer, lambda t: 0.8**t)
    for t in range(6):
        train(model, optimizer, range(t, t + 1), scheduler)
        for group in other.param_groups:
            group["lr"] = 1e-2 * 0.8**t
        train(twin, other, range(t, t + 1))
    assert_identical(model, optimizer, twin, other)


def test_first_step_of_a_warm_up_from_zero_is_a_real_step():
    model, optimizer = built()
    scheduler = LambdaLR(optimizer, lambda t: t / 2)
    weights = [p.detach().clone() for p in model.parameters()]
    assert train(model, optimizer, 1, scheduler) == [{name: ["fft"] for name in "145"}]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))
    state = optimizer.state[model[1].weight]
    assert state["step"] == 1 and state["exp_avg"].any() and state["lora_r2.B.exp_avg"].any()
    train(model, optimizer, range(1, 2), scheduler)
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True) if p.ndim == 2]
    assert moved == [True] * 4  # biases wait for fft to win


def test_loras_rate_follows_the_schedule():
    """A first step is lr wide whatever the gradient: B moves by LoRA's rate at that step."""
    for factor in (1.0, 0.5, 0.125):
        model, optimizer = built(score=Prefer(1))
        scheduler = LambdaLR(optimizer, lambda t, factor=factor: factor)
        train(model, optimizer, 1, scheduler)
        widest = optimizer.experts["1"]["lora_r2"].B.abs().max().item()
        assert widest == pytest.approx(factor * 2e-2, rel=1e-4)


# --- loops ------------------------------------------------------------------------------------------------------------


def test_closure():
    model, optimizer = built()
    twin, other = built()
    for t in range(4):

        def closure(t=t):
            optimizer.zero_grad()
            loss = loss_of(model, t)
            loss.backward()
            return loss

        expected = loss_of(model, t).item()
        assert optimizer.step(closure).item() == expected
        train(twin, other, range(t, t + 1))
    assert_identical(model, optimizer, twin, other)


def test_without_a_closure_there_is_no_loss():
    model, optimizer = built()
    loss_of(model, 0).backward()
    assert optimizer.step() is None


def test_both_ways_of_clearing_gradients():
    model, optimizer = built()
    twin, other = built()
    for t in range(4):
        for m, o, to_none in ((model, optimizer, True), (twin, other, False)):
            o.zero_grad(set_to_none=to_none)
            loss_of(m, t).backward()
            o.step()
    assert_identical(model, optimizer, twin, other)


def test_accumulated_gradients_are_one_batch():
    model, optimizer = built()
    twin, other = built()
    for t in range(3):
        optimizer.zero_grad()
        for micro in range(4):
            (loss_of(model, 4 * t + micro) / 4).backward()
        optimizer.step()
        other.zero_grad()
        (sum(loss_of(twin, 4 * t + micro) for micro in range(4)) / 4).backward()
        other.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=TOLERANCE[torch.float64])


def test_a_layer_that_is_not_used_rests():
    model, optimizer = built()
    twin, other = built()
    train(model, optimizer, 2)
    train(twin, other, 2)
    before = snapshot(model, optimizer)
    ids = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    resting = {f"model.{name}" for name in ("4.weight", "3.weight", "3.bias")}
    resting |= {
        k for k in before if any(k.startswith(f"state.{ids[id(model.get_parameter(n[6:]))]}.") for n in resting)
    }
    for m, o in ((model, optimizer), (twin, other)):
        o.zero_grad()
        loss_of(m, 2).backward()
    for name in ("4.weight", "3.weight", "3.bias"):
        model.get_parameter(name).grad = None
    optimizer.step()
    other.step()
    assert optimizer.routing.modules == ("1", "5")
    changed = differing(before, snapshot(model, optimizer))
    assert not changed & resting
    assert {"model.0.weight", "model.1.weight", "model.5.weight"} <= changed
    assert optimizer.state[model[1].weight]["step"] == 3 and optimizer.state[model[4].weight]["step"] == 2
    for name in ("1.weight", "1.bias", "0.weight"):
        assert torch.equal(model.get_parameter(name), twin.get_parameter(name))
    train(model, optimizer, range(3, 5))
    assert optimizer.routing.modules == ("1", "4", "5")
    assert optimizer.state[model[4].weight]["step"] == 4 and optimizer.state[model[3].weight]["step"] == 4


def test_later_groups_are_trained():
    model, optimizer = built()
    extra = nn.Parameter(torch.ones(3, 3, dtype=torch.float64))
    optimizer.add_param_group({"params": [extra]})
    extra.grad = torch.ones_like(extra)
    optimizer.step()
    assert (extra < 1).all() and optimizer.param_groups[-1]["skipped_steps"] == 0


def test_the_model_stays_an_ordinary_model():
    model = tiny_llama()
    kinds, names = [type(m) for m in model.modules()], list(model.state_dict())
    optimizer = MoLF(model, ranks=(2,), lr=1e-3)
    ids = torch.arange(16).view(2, 8)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert [type(m) for m in model.modules()] == kinds
    assert list(model.state_dict()) == names
    assert not any(m._forward_hooks or m._backward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_compiled_model_trains_alike():
    model, twin = mlp(), mlp()
    compiled = torch.compile(twin, backend="eager")
    torch.manual_seed(1)
    optimizer = MoLF(model, ranks=(2,), lr=1e-2)
    torch.manual_seed(1)
    other = MoLF(compiled, ranks=(2,), lr=1e-2)
    assert list(other.experts) == list(optimizer.experts)
    assert train(model, optimizer, 3) == train(compiled, other, 3)
    assert_identical(model, optimizer, twin, other)


def test_layers_worked_on_together_are_layers_worked_on_alone(monkeypatch):
    """An accelerator takes many layers at once, a CPU one after the other."""
    alone, together = built(top_k=2), built(top_k=2)
    resting = alone[0][4].weight
    winners = train(*alone, 3)
    monkeypatch.setattr("molf.router._chunks", lambda layers: iter([layers]))
    assert train(*together, 3) == winners
    assert_identical(*alone, *together)
    for model, optimizer in (alone, together):
        optimizer.zero_grad()
        loss_of(model, 3).backward()
        model[4].weight.grad = None  # now step counts differ
    together[1].step()
    train(*together, range(4, 6))
    monkeypatch.undo()
    alone[1].step()
    train(*alone, range(4, 6))
    assert alone[1].state[resting]["step"] == 5
    assert_identical(*alone, *together)


def test_the_default_device_is_of_no_account():
    """As after torch.set_default_device: nothing may be made on a device that was not asked for."""
    model, optimizer = built(max_grad_norm=1.0)
    twin, other = mlp(), None
    loss_of(model, 0).backward()
    loss_of(twin, 0).backward()
    optimizer.step()
    torch.manual_seed(1)
    groups = param_groups(twin, ranks=(2, 3), lr=1e-2, lora_lr=2e-2)
    with torch.device("meta"):
        other = MoLF(groups, max_grad_norm=1.0)
        other.step()
    assert_identical(model, optimizer, twin, other)


# --- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float64, {"max_grad_norm": 0.1, "score": "pfn", "top_k": 2}),
        (torch.bfloat16, {"bf16_update": "stochastic", "score": AllAlike()}),
        (torch.bfloat16, {}),
    ],
    ids=["float64", "stochastic", "split"],
)
def test_copies_go_on_alike(copied, steps, dtype, options):
    model, optimizer = built(dtype, **options)
    train(model, optimizer, steps)
    twin, other = copied((model, optimizer))
    assert other.routing is None if steps == 0 else other.routing.winners() == optimizer.routing.winners()
    assert {id(p) for g in other.param_groups for p in g["params"]} == {id(p) for p in twin.parameters()}
    rest = range(steps, steps + 3)
    assert train(model, optimizer, rest) == train(twin, other, rest)
    assert_identical(model, optimizer, twin, other)
    assert other.skipped_steps == 0


def test_a_copy_is_independent():
    model, optimizer = built()
    train(model, optimizer, 2)
    twin, other = copy.deepcopy((model, optimizer))
    before = snapshot(model, optimizer)
    train(twin, other, 3)
    assert not differing(before, snapshot(model, optimizer))


# --- dry steps --------------------------------------------------------------------------------------------------------


def dry_step(model, optimizer, zero=0.0):
    rates = [group["lr"] for group in optimizer.param_groups]
    zero_gradients(model)
    for group in optimizer.param_groups:
        group["lr"] = zero
    optimizer.step()
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = lr
    optimizer.zero_grad()


@pytest.mark.parametrize("zero", [0.0, torch.tensor(0.0)], ids=["float", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_dry_step_is_no_step(zero, dtype):
    model, optimizer = built(dtype)
    twin, other = built(dtype)
    dry_step(model, optimizer, zero)
    assert optimizer.routing is None
    assert all(state["step"] == 0 for state in optimizer.state.values() if "step" in state)
    assert all("exp_avg" in optimizer.state[p] for p in model.parameters())  # what it is taken for
    assert train(model, optimizer, 4) == train(twin, other, 4)
    assert_identical(model, optimizer, twin, other)


def test_where_there_is_state_nobody_takes_a_dry_step():
    """Whether gradients are zero is not looked into then: on an accelerator that would wait for it."""
    model, optimizer = built()
    train(model, optimizer, 2)
    moments = optimizer.state[model[1].weight]["exp_avg"].clone()
    dry_step(model, optimizer)
    assert optimizer.state[model[1].weight]["step"] == 3
    torch.testing.assert_close(optimizer.state[model[1].weight]["exp_avg"], 0.9 * moments)


@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.float32, {}), (torch.bfloat16, {}), (torch.bfloat16, {"bf16_update": "stochastic"})],
    ids=["float32", "split", "stochastic"],
)
def test_distributed_checkpoint_functions_resume_exactly(flatten, dtype, options):
    how = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = built(dtype, **options)
    train(model, optimizer, 3)
    optimizer.zero_grad()
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=how))

    twin = copy.deepcopy(model)
    torch.manual_seed(99)
    other = MoLF(twin, ranks=(2, 3), lr=1e-2, lora_lr=2e-2, **options)
    set_optimizer_state_dict(twin, other, copy.deepcopy(saved), options=how)
    assert other.routing is None and other.skipped_steps == 0
    assert train(model, optimizer, range(3, 6)) == train(twin, other, range(3, 6))
    assert_identical(model, optimizer, twin, other)


def test_distributed_checkpoint_of_a_fresh_optimizer_is_not_a_step():
    model, optimizer = built()
    twin, other = built()
    get_optimizer_state_dict(model, optimizer)
    assert optimizer.routing is None and optimizer.grad_norm is None
    assert train(model, optimizer, 3) == train(twin, other, 3)
    assert_identical(model, optimizer, twin, other)


# --- construction -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": 0}, r"top_k=0: choose between 1 and 2, the number of experts \(fft, lora_r2\)"),
        ({"top_k": 3}, "top_k=3: choose between 1 and 2"),
        ({"top_k": 1.0}, r"top_k=1\.0"),
        ({"top_k": True}, "top_k=True"),
        ({"ranks": (), "top_k": 2}, r"choose between 1 and 1, the number of experts \(fft\)"),
        ({"score": "edp"}, "did you mean 'epd'"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0\.9, 1\.0\): give two numbers in \[0, 1\)"),
        ({"betas": (-0.1, 0.9)}, "betas"),
        ({"betas": (float("nan"), 0.9)}, "betas"),
        ({"betas": (0.9,)}, "betas"),
        ({"eps": 0.0}, r"eps=0\.0: must be above 0"),
        ({"eps": -1e-8}, "eps"),
        ({"eps": float("nan")}, "eps=nan"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm=0\.0: must be above 0, or None"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm=nan"),
        ({"bf16_update": "kahan"}, r"bf16_update='kahan': use one of \['split', 'stochastic'\]"),
        ({"lr": -1.0}, r"lr=-1\.0"),
        ({"lora_lr": float("nan")}, "lora_lr=nan"),
        ({"ranks": (2, 2)}, "may occur once"),
        ({"ranks": (14,)}, "exceeds the smallest routed layer"),
        ({"lora_alpha": (1, 2)}, "lora_alpha"),
        ({"target_modules": ["nothing"]}, "no layer matches"),
    ],
    ids=str,
)
def test_options_that_do_not_work(options, words):
    with pytest.raises(ValueError, match=words):
        MoLF(mlp(), **{"ranks": (2,), **options})


def test_unknown_options_and_scores():
    with pytest.raises(TypeError, match="rank"):
        MoLF(mlp(), rank=8)
    with pytest.raises(TypeError, match=r"score must be.*got float"):
        MoLF(mlp(), ranks=(2,), score=1.0)


@pytest.mark.parametrize(
    "given",
    [
        lambda m: m.parameters(),
        lambda m: list(m.parameters()),
        lambda m: [{"params": list(m.parameters())}],
        lambda m: [],
    ],
    ids=["parameters", "list", "group", "empty"],
)
def test_bare_parameters(given):
    with pytest.raises(TypeError, match=r"pass the model, MoLF\(model, \.\.\.\).*not bare parameters"):
        MoLF(given(mlp()))


def test_options_of_the_groups_belong_to_param_groups():
    with pytest.raises(ValueError, match=r"ranks belongs to param_groups"):
        MoLF(param_groups(mlp(), ranks=(2,)), ranks=(2,))


def test_groups_of_different_ranks():
    with pytest.raises(ValueError, match="same experts"):
        MoLF(param_groups(mlp(), ranks=(2,)) + param_groups(mlp(), ranks=(3,)))


def test_no_random_number_is_drawn():
    drawn = []
    for ranks in ((2,), (2, 3), ()):
        model = mlp()
        torch.manual_seed(4)
        optimizer = MoLF(model, ranks=ranks)
        assert len(list(optimizer.experts.values())) == 3  # looking creates the LoRA start
        drawn.append(torch.rand(()).item())
    torch.manual_seed(4)
    assert drawn == [torch.rand(()).item()] * 3
