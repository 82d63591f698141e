import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, SequentialLR

import molf.errors
from molf import MoLF, param_groups
from molf.scores import EPD
from molf.setup.param_groups import alignment
from small import AllAlike, Prefer, assert_same_bits, differing, mlp, routed_mlp, snapshot, train, zero_gradients


def test_routing_records_the_decision():
    model, optimizer = routed_mlp(top_k=2)
    train(model, optimizer, 2)
    routing = optimizer.routing
    assert isinstance(routing, molf.Routing)
    assert (routing.modules, routing.experts) == (("1", "4", "5"), ("fft", "lora_r2", "lora_r3"))
    assert routing.scores.shape == routing.chosen.shape == (3, 3)
    assert (routing.scores.dtype, routing.chosen.dtype) == (torch.float64, torch.bool)
    assert routing.chosen.sum(dim=1).tolist() == [2, 2, 2]
    assert all(len(names) == 2 for names in routing.winners().values())


@pytest.mark.parametrize("score", ["epd", "pfn", pytest.param(AllAlike(), id="equal")], ids=str)
@pytest.mark.parametrize("top_k", [1, 2])
def test_ties_go_to_the_earlier_experts(score, top_k):
    """All gradients are zero, or all scores are equal."""
    model, optimizer = routed_mlp(score=score, top_k=top_k)
    if isinstance(score, str):
        zero_gradients(model)
        optimizer.step()
    else:
        train(model, optimizer, 2)
    assert set(map(tuple, optimizer.routing.winners().values())) == {("fft", "lora_r2")[:top_k]}


@pytest.mark.parametrize(("column", "winner"), list(enumerate(["fft", "lora_r2", "lora_r3"])))
def test_own_score(column, winner):
    model, optimizer = routed_mlp(score=Prefer(column))
    assert train(model, optimizer, 2) == [{name: [winner] for name in "145"}] * 2


class Inspecting(EPD):
    """EPD computed from its terms, recording its arguments."""

    name = "inspecting"

    def partial(self, m, v, u, eps):
        return self.term(m, v, eps).sum()

    def finish(self, total, n, lr):
        self.n, self.lr = n, lr
        return super().finish(total, n, lr)


def test_a_score_sees_sizes_and_scheduled_rates():
    model, optimizer = routed_mlp(score=Inspecting())
    twin, other = routed_mlp()
    for m, o in ((model, optimizer), (twin, other)):
        train(m, o, 3, LambdaLR(o, lambda t: 0.5**t))
    assert optimizer.score.n.tolist() == [[104, 40, 60], [65, 36, 54], [18, 16, 24]]
    torch.testing.assert_close(optimizer.score.lr, torch.tensor([[1e-2, 2e-2, 2e-2]] * 3).double() / 4)
    torch.testing.assert_close(optimizer.routing.scores, other.routing.scores, rtol=1e-10, atol=0)


SCHEDULES = {
    "lambda": lambda o: LambdaLR(o, lambda t: min(1.0, t / 3) * 0.9**t),
    "cosine": lambda o: CosineAnnealingLR(o, 8),
    "sequential": lambda o: SequentialLR(o, [LinearLR(o, 0.1, total_iters=3), CosineAnnealingLR(o, 5)], [3]),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_a_tensor_rate_is_a_rate(schedule):
    if torch.__version__ < (2, 9) and schedule is SCHEDULES["sequential"]:
        pytest.skip("SequentialLR of torch 2.8 gives another rate if it is a tensor, with torch.optim.AdamW too")
    model, optimizer = routed_mlp()
    twin, other = routed_mlp(lr=torch.tensor(1e-2, dtype=torch.float64))
    assert train(model, optimizer, 8, schedule(optimizer)) == train(twin, other, 8, schedule(other))
    assert isinstance(other.param_groups[0]["lr"], torch.Tensor)
    assert_same_bits(model, optimizer, twin, other)


def test_first_step_of_a_warm_up_from_zero_is_a_real_step():
    model, optimizer = routed_mlp()
    scheduler = LambdaLR(optimizer, lambda t: t / 2)
    weights = [p.detach().clone() for p in model.parameters()]
    twin, other = routed_mlp()
    winners = train(model, optimizer, 1, scheduler)
    assert winners == train(twin, other, 1) and optimizer.routing.scores.equal(other.routing.scores)
    assert {own for won in winners[0].values() for own in won} != {"fft"}
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))
    state = optimizer.state[model[1].weight]
    assert state["step"] == 1 and state["exp_avg"].any() and state["lora_r2.B.exp_avg"].any()
    train(model, optimizer, range(1, 2), scheduler)
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True) if p.ndim == 2]
    assert moved == [True] * 4  # biases wait for fft to win


@pytest.mark.parametrize("lora_lr", [2e-2, 0.0])
def test_at_a_rate_of_zero_without_a_schedule_the_ratios_decide(lora_lr):
    """A LoRA expert whose own rate is 0 at any rate never wins."""
    model, optimizer = routed_mlp(lora_lr=lora_lr)
    twin, other = routed_mlp(lora_lr=lora_lr)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    weights = [p.detach().clone() for p in model.parameters()]
    assert train(model, optimizer, 2)[:1] == train(twin, other, 1)
    torch.testing.assert_close(optimizer.routing.scores[:, 1:].any(), torch.tensor(lora_lr > 0))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))


def test_loras_rate_follows_the_schedule():
    """A first step is lr wide whatever the gradient: B moves by LoRA's rate at that step."""
    for factor in (1.0, 0.5, 0.125):
        model, optimizer = routed_mlp(score=Prefer(1))
        scheduler = LambdaLR(optimizer, lambda t, factor=factor: factor)
        train(model, optimizer, 1, scheduler)
        widest = optimizer.experts["1"]["lora_r2"].B.abs().max().item()
        assert widest == pytest.approx(factor * 2e-2, rel=1e-4)


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
        ({"betas": (float("nan"), 0.9)}, "betas"),
        ({"betas": (0.9,)}, "betas"),
        ({"betas": 0.9}, r"betas=0\.9: give two numbers"),
        ({"fused": "yes"}, "fused='yes': use True, False, or None"),
        ({"eps": 0.0}, r"eps=0\.0: must be above 0"),
        ({"eps": float("nan")}, "eps=nan"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm=0\.0: must be above 0 and finite, or None"),
        ({"max_grad_norm": float("inf")}, "max_grad_norm=inf: must be above 0 and finite, or None"),
        ({"optimizer_in_backward": "no"}, "optimizer_in_backward='no': use True or False"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm=nan"),
        ({"bf16_update": "kahan"}, r"bf16_update='kahan': use one of \['split', 'stochastic'\]"),
        ({"ranks": (2, 2)}, "may occur only once"),
        ({"ranks": (14,)}, "exceeds the smallest routed layer"),
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


@pytest.mark.parametrize("given", [iter, list, lambda params: [{"params": list(params)}], lambda params: []])
def test_bare_parameters(given):
    with pytest.raises(TypeError, match=r"pass the model, MoLF\(model, \.\.\.\).*not bare parameters"):
        MoLF(given(mlp().parameters()))


def test_options_of_the_groups_belong_to_param_groups():
    with pytest.raises(ValueError, match=r"ranks belongs to param_groups"):
        MoLF(param_groups(mlp(), ranks=(2,)), ranks=(2,))


@pytest.mark.parametrize("option", [{"lr": 1e-2}, {"lr": torch.tensor(1e-2)}, {"weight_decay": 0.0}], ids=str)
def test_rates_that_no_group_would_take_belong_to_param_groups(option):
    (name,) = option
    with pytest.raises(molf.errors.MolfError, match=rf"{name} belongs to param_groups\(model, {name}=\.\.\.\)"):
        MoLF(param_groups(mlp(), ranks=(2,)), **option)
    assert MoLF(param_groups(mlp(), ranks=(2,), **option), **option).param_groups[-1][name] == option[name]
    extra = {"params": [nn.Parameter(torch.ones(2))]}
    optimizer = MoLF([*param_groups(mlp(), ranks=(2,)), extra], **option)
    assert optimizer.param_groups[-1][name] == option[name] != optimizer.param_groups[-2][name]


def test_layers_of_two_models_need_names_of_their_own():
    first, second = mlp(), mlp()
    with pytest.raises(molf.errors.MolfError, match=r"3 routed layers have the same name as another \(1\).*ModuleDict"):
        MoLF([*param_groups(first, ranks=(2,)), *param_groups(second, ranks=(2,))])
    both = MoLF(nn.ModuleDict({"first": first, "second": second}), ranks=(2,))
    assert list(both.experts) == [f"{model}.{layer}" for model in ("first", "second") for layer in "145"]


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


def test_with_matched_rates_alpha_changes_nothing():
    ends = []
    for alpha in (8.0, 32.0):
        model, optimizer = routed_mlp(lora_lr="matched", lora_alpha=alpha)
        train(model, optimizer, 4)
        ends.append((model, optimizer))
    assert_same_bits(*ends[0], *ends[1])


@pytest.mark.parametrize("rank", [1, 8, 32, 128])
def test_a_matched_lora_step_is_as_long_as_it_is_aligned(rank):
    lengths, cosines = [], []
    for column in (0, 1):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(400, 300, bias=False))
        before = model[0].weight.detach().clone()
        optimizer = MoLF(model, ranks=(rank,), lr=1e-3, score=Prefer(column), weight_decay=0.0, lora_alpha=7.0)
        model(torch.randn(50, 400)).pow(3).sum().backward()
        optimizer.step()
        step, gradient = before - model[0].weight, model[0].weight.grad
        lengths.append(step.norm().item())
        cosines.append((step * gradient).sum().item() / (step.norm() * gradient.norm()).item())
    assert cosines[1] / cosines[0] == pytest.approx(alignment(rank, 400), rel=0.15)
    assert lengths[1] / lengths[0] == pytest.approx(alignment(rank, 400), rel=0.1)


@pytest.mark.parametrize("rank", [4, 16, 64])
@pytest.mark.parametrize(
    ("score", "low", "high"), [("epd", 0.42, 0.52), ("descent", 0.0, 0.25), ("coherence", 0.95, 1.05)], ids=str
)
def test_what_shape_alone_makes_of_a_score_at_matched_rates(score, low, high, rank):
    """LoRA's score as a multiple of that of ``fft``, if gradients are noise: EPD's is some ``out / (in + out)`` at any rank."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(256, 256, bias=False))
    optimizer = MoLF(model, ranks=(rank,), lr=1e-3, score=score)
    for _ in range(5):
        model[0].weight.grad = torch.randn(256, 256)
        optimizer.step()
    (fft, lora) = optimizer.routing.scores[0].tolist()
    assert low < lora / fft < high


@pytest.mark.parametrize(
    ("lora_lr", "words"), [("match", 'give a number, None for lr, or "matched"'), (-1.0, "0 or more")], ids=str
)
def test_wrong_lora_rates(lora_lr, words):
    with pytest.raises(ValueError, match=words):
        MoLF(mlp(), ranks=(2,), lora_lr=lora_lr)


def test_random_routing_resumes_exactly():
    model, optimizer = routed_mlp(score="random", lora_lr="matched")
    first = train(model, optimizer, 3)
    twin, other = routed_mlp(score="random", lora_lr="matched")
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    assert train(model, optimizer, range(3, 8)) == train(twin, other, range(3, 8))
    assert_same_bits(model, optimizer, twin, other)
    assert len({str(winners) for winners in first}) > 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lora_lr": True}, "lora_lr=True: must be a finite number"),
        ({"lora_lr": [1e-3]}, "lora_lr=.*finite number"),
        ({"lr": None}, "lr=None: must be a finite number"),
        ({"weight_decay": None}, "weight_decay=None"),
        ({"eps": "1e-8"}, "eps='1e-8': must be above 0"),
        ({"betas": ("a", "b")}, r"betas=\('a', 'b'\): give two numbers"),
        ({"max_grad_norm": "1"}, "max_grad_norm='1'"),
        ({"lora_alpha": "x"}, "lora_alpha='x': give one number"),
        ({"target_modules": "*["}, r"'\*\[' is no regular expression"),
    ],
    ids=str,
)
def test_options_of_a_wrong_type_are_named(options, words):
    with pytest.raises(molf.errors.MolfError, match=words):
        MoLF(mlp(), **{"ranks": (2,), **options})


def test_a_term_of_ones_own_counts_in_a_subclass():
    class Louder(EPD):
        def term(self, m, v, eps):
            return 2 * super().term(m, v, eps)

    scores = []
    for score in (EPD(), Louder()):
        model, optimizer = routed_mlp(score=score)
        train(model, optimizer, 1)
        scores.append(optimizer.routing.scores)
    torch.testing.assert_close(scores[1], 2 * scores[0])


class Short(EPD):
    def finish(self, total, n, lr):
        return total[:, 0]


class Misspelt(EPD):
    def partial(self, m, v, u, eps):
        return m.summ()


class Number(EPD):
    def partial(self, m, v, u, eps):
        return float((m * u).sum())


class Unsummed(EPD):
    def partials(self, m, v, u, eps):
        return m * u


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize(
    ("score", "error", "words"),
    [
        (Short(), molf.errors.MolfError, r"Short returned scores \[3\].*must return \[M, E\] = \[3, 3\]"),
        (Misspelt(), AttributeError, "summ"),
        (Number(), molf.errors.MolfError, "Number.partial returned a float: it must return a tensor"),
        (Unsummed(), molf.errors.MolfError, r"Unsummed.partials returned a tensor \[2, 2\]: it must .* over each row"),
    ],
    ids=["shape", "term", "partial", "partials"],
)
def test_a_score_that_cannot_work_fails_before_anything_moves(score, error, words, later):
    model, optimizer = routed_mlp()
    train(model, optimizer, int(later))
    optimizer.score, before = score, snapshot(model, optimizer)
    with pytest.raises(error, match=words):
        train(model, optimizer, 1)
    after = snapshot(model, optimizer)
    assert not differing(before, {key: after[key] for key in before})
    assert all(own["step"] == later for own in optimizer.state.values() if "step" in own)


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("score", "pnf", r"unknown score 'pnf'.*did you mean 'pfn'"),
        ("top_k", 0, "top_k=0: choose between 1 and 3"),
        ("top_k", 4, "top_k=4: choose between 1 and 3"),
        ("max_grad_norm", 0.0, r"max_grad_norm=0\.0: must be above 0 and finite, or None"),
    ],
)
def test_options_that_are_set_between_steps_are_checked(option, value, words, later):
    model, optimizer = routed_mlp()
    train(model, optimizer, int(later))
    setattr(optimizer, option, value)
    before = snapshot(model, optimizer)
    with pytest.raises(molf.errors.MolfError, match=words):
        train(model, optimizer, 1)
    after = snapshot(model, optimizer)
    assert not differing(before, {key: after[key] for key in before})


def test_a_score_may_be_set_by_name_between_steps():
    (model, optimizer), (twin, other) = routed_mlp(score="pfn"), routed_mlp()
    other.score = "pfn"
    train(model, optimizer, 2)
    train(twin, other, 2)
    assert_same_bits(model, optimizer, twin, other)


def test_a_score_of_ones_own_is_tried_once_on_a_copy():
    class Counting(EPD):
        calls = 0

        def finish(self, total, n, lr):
            self.calls += 1
            return super().finish(total, n, lr)

    model, optimizer = routed_mlp(score=Counting())
    train(model, optimizer, 3)
    assert optimizer.score.calls == 3
