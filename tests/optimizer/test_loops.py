"""The ways in which training loops call an optimizer, and what may happen to a model meanwhile."""

import pytest
import torch
from torch import nn

from conftest import TOLERANCE
from molf import MoLF, param_groups
from molf.errors import MolfError
from molf.optimizer import torch_step
from small import (
    assert_same_bits,
    differing,
    loss_of,
    mlp,
    routed_mlp,
    snapshot,
    tiny_llama,
    train,
    wide,
    zero_gradients,
)


def test_closure():
    model, optimizer = routed_mlp()
    twin, other = routed_mlp()
    for t in range(4):

        def closure(t=t):
            optimizer.zero_grad()
            loss = loss_of(model, t)
            loss.backward()
            return loss

        expected = loss_of(model, t).item()
        assert optimizer.step(closure).item() == expected
        train(twin, other, range(t, t + 1))
    assert_same_bits(model, optimizer, twin, other)
    assert other.step() is None


def test_both_ways_of_clearing_gradients():
    model, optimizer = routed_mlp()
    twin, other = routed_mlp()
    for t in range(4):
        for m, o, to_none in ((model, optimizer, True), (twin, other, False)):
            o.zero_grad(set_to_none=to_none)
            loss_of(m, t).backward()
            o.step()
    assert_same_bits(model, optimizer, twin, other)


def test_accumulated_gradients_are_one_batch():
    model, optimizer = routed_mlp()
    twin, other = routed_mlp()
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


def test_an_unused_layer_does_not_change():
    model, optimizer = routed_mlp()
    twin, other = routed_mlp()
    train(model, optimizer, 2)
    train(twin, other, 2)
    before = snapshot(model, optimizer)
    numbers = {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    names = ("4.weight", "3.weight", "3.bias")
    unused = {f"model.{name}" for name in names}
    prefixes = tuple(f"state.{numbers[model.get_parameter(name)]}." for name in names)
    unused |= {key for key in before if key.startswith(prefixes)}
    for m, o in ((model, optimizer), (twin, other)):
        o.zero_grad()
        loss_of(m, 2).backward()
        for name in names if m is model else ():
            m.get_parameter(name).grad = None
        o.step()
    assert optimizer.routing.modules == ("1", "5")
    changed = differing(before, snapshot(model, optimizer))
    assert not changed & unused
    assert {"model.0.weight", "model.1.weight", "model.5.weight"} <= changed
    assert optimizer.state[model[1].weight]["step"] == 3 and optimizer.state[model[4].weight]["step"] == 2
    for name in ("1.weight", "1.bias", "0.weight"):
        assert torch.equal(model.get_parameter(name), twin.get_parameter(name))
    train(model, optimizer, range(3, 5))
    assert optimizer.routing.modules == ("1", "4", "5")
    assert optimizer.state[model[4].weight]["step"] == 4 and optimizer.state[model[3].weight]["step"] == 4


def test_later_groups_are_trained():
    model, optimizer = routed_mlp()
    extra = nn.Parameter(torch.ones(3, 3, dtype=torch.float64))
    optimizer.add_param_group({"params": [extra]})
    extra.grad = torch.ones_like(extra)
    optimizer.step()
    assert (extra < 1).all() and optimizer.param_groups[-1]["skipped_steps"] == 0


@pytest.mark.parametrize("ranks", [(2,), (3,), (2, 3)])
def test_a_later_routed_group_has_the_same_experts_and_a_name_of_its_own(ranks):
    model, optimizer = routed_mlp(ranks=(2,))
    other = nn.ModuleDict({"head": nn.Linear(3, 3), "1": nn.Linear(3, 3)}).double()
    head, twice = param_groups(other, ranks=ranks)
    if ranks == (2,):
        optimizer.add_param_group(head)
        zero_gradients(other)
        optimizer.step()
        assert optimizer.routing.modules == ("head",)
        head = twice
    words = "the same name as another" if ranks == (2,) else "must have the same experts"
    before = len(optimizer.param_groups)
    with pytest.raises(MolfError, match=words):
        optimizer.add_param_group(head)
    assert len(optimizer.param_groups) == before


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "given",
    [lambda p: (q for q in [p]), lambda p: p, lambda p: p.data.new_ones(())],
    ids=["generator", "tensor", "0-d"],
)
def test_a_group_may_be_given_as_torch_allows(given, first):
    """As an iterator, which can be looked through once, or as a tensor; the caller's groups stay as they are."""
    model, extra = mlp(), nn.Parameter(torch.ones(3, dtype=torch.float64))
    params = given(extra)
    if isinstance(params, torch.Tensor):
        extra = params.requires_grad_()
    own = {"params": params, "lr": 1e-2}
    routed = param_groups(model, ranks=(2,))
    optimizer = MoLF([own, *routed] if first else [*routed, own])
    assert [len(group["params"]) for group in optimizer.param_groups][0 if first else -1] == 1
    zero_gradients(model)
    extra.grad = torch.ones_like(extra)
    optimizer.step()
    assert (extra < 1).all() and own == {"params": params, "lr": 1e-2} and "betas" not in routed[0]


def test_betas_may_be_lists():
    """As in a group that is given, and in one that was edited between steps."""
    pairs = routed_mlp(betas=[0.9, 0.99]), routed_mlp(betas=(0.9, 0.99))
    for (model, optimizer), kind in zip(pairs, (list, tuple), strict=True):
        extra = nn.Parameter(torch.ones(2, dtype=torch.float64))
        optimizer.add_param_group({"params": extra, "betas": kind((0.5, 0.6))})
        assert optimizer.param_groups[0]["betas"] == (0.9, 0.99) and optimizer.param_groups[-1]["betas"] == (0.5, 0.6)
        for group in optimizer.param_groups:
            group["betas"] = kind((0.8, 0.9))
        train(model, optimizer, 2)
    assert_same_bits(*pairs[0], *pairs[1])


def test_a_group_that_is_removed_is_named_as_a_cause():
    model, optimizer = routed_mlp()
    train(model, optimizer, 1)
    optimizer.param_groups.pop()
    with pytest.raises(
        RuntimeError, match="in none of its groups.*groups removed from param_groups, make a new optimizer"
    ):
        optimizer.step()


@pytest.mark.parametrize("release", [True, False])
def test_an_empty_group_may_come_first(release):
    model = mlp()
    optimizer = MoLF([{"params": []}, *param_groups(model, ranks=(2,))], optimizer_in_backward=release)
    assert train(model, optimizer, 2)[-1]


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ({"params": torch.ones(2, dtype=torch.float16)}, "parameter 0 of the group is torch.float16: train float32"),
        ({"params": [torch.ones(2), torch.ones(2, dtype=torch.complex64)]}, "parameter 1 of the group is torch.complex64"),
        ({"params": torch.ones(3, 2).T}, "not contiguous"),
        ({"params": torch.ones(2), "lr": -1.0}, "lr=-1.0"),
        ({"params": torch.ones(2), "lr": float("nan")}, "lr=nan"),
        ({"params": torch.ones(2), "weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"params": torch.ones(2), "betas": (0.9, 1.0)}, "betas="),
        ({"params": torch.ones(2), "eps": 0.0}, "eps="),
        ({"params": torch.ones(2, dtype=torch.float64)}, "optim_bits=8 with float64"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("later", [True, False])
def test_groups_that_cannot_be_trained_are_refused(group, words, later):
    torch.manual_seed(0)
    model, options = wide(), {"optim_bits": 8}
    given = group["params"] if isinstance(group["params"], list) else [group["params"]]
    group = {**group, "params": [nn.Parameter(p) for p in given]}
    groups = param_groups(model, ranks=(2,))
    optimizer = MoLF(groups, **options)
    with pytest.raises(MolfError, match=words):
        if later:
            optimizer.add_param_group(group)
        else:
            MoLF([*groups, group], **options)
    assert len(optimizer.param_groups) == len(groups)


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
    (model, optimizer), twin = routed_mlp(), mlp()
    compiled = torch.compile(twin, backend="eager")
    torch.manual_seed(1)
    other = MoLF(compiled, ranks=(2, 3), lr=1e-2, lora_lr=2e-2)
    assert list(other.experts) == list(optimizer.experts)
    assert train(model, optimizer, 3) == train(compiled, other, 3)
    assert_same_bits(model, optimizer, twin, other)


def test_small_layers_share_calls_and_no_bit(monkeypatch):
    calls, kernel = [], torch._fused_adamw_
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *args, **kwargs: calls.append(1) or kernel(*args, **kwargs))

    def ended(layers):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(a, b) for a, b in layers))
        optimizer = MoLF(model, ranks=(2, 3), score="pfn", lr=1e-2)
        for t in range(3):
            torch.manual_seed(t)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            calls.clear()
            optimizer.step()
        return model, optimizer

    layers = [(7, 5), (33, 32), (3, 9)] * 5
    together = ended(layers)
    assert len(calls) <= 6  # three experts' moments and steps, not those of every layer
    monkeypatch.setattr("molf.optimizer.torch_step._CPU_CHUNK", 0)
    alone = ended(layers)
    assert_same_bits(*alone, *together)
    assert alone[1].routing.scores.equal(together[1].routing.scores)


def test_layers_updated_together_are_layers_updated_alone(monkeypatch):
    """An accelerator updates many layers at once, a CPU one after the other."""
    alone, together = routed_mlp(top_k=2), routed_mlp(top_k=2)
    winners = train(*alone, 3)
    monkeypatch.setattr("molf.optimizer.torch_step._chunks", lambda layers: iter([layers]))
    assert train(*together, 3) == winners
    assert_same_bits(*alone, *together)
    for model, optimizer in (alone, together):
        optimizer.zero_grad()
        loss_of(model, 3).backward()
        model[4].weight.grad = None  # now step counts differ
    together[1].step()
    train(*together, range(4, 6))
    monkeypatch.undo()
    alone[1].step()
    train(*alone, range(4, 6))
    assert alone[1].state[alone[0][4].weight]["step"] == 5
    assert_same_bits(*alone, *together)


def test_the_default_device_does_not_matter():
    """As after torch.set_default_device: every tensor is made on the model's device."""
    model, optimizer = routed_mlp(max_grad_norm=1.0)
    twin, other = mlp(), None
    loss_of(model, 0).backward()
    loss_of(twin, 0).backward()
    optimizer.step()
    torch.manual_seed(1)
    groups = param_groups(twin, ranks=(2, 3), lr=1e-2, lora_lr=2e-2)
    with torch.device("meta"):
        other = MoLF(groups, max_grad_norm=1.0)
        other.step()
    assert_same_bits(model, optimizer, twin, other)


def test_a_compiled_step_is_the_step():
    """``step`` stays out of dynamo, whose guards cannot follow the optimizer's state."""
    (model, optimizer), (twin, other) = routed_mlp(), routed_mlp()
    compiled = torch.compile(optimizer.step, backend="eager")
    for t in range(3):
        for m, step in ((model, compiled), (twin, other.step)):
            m.zero_grad()
            loss_of(m, t).backward()
            step()
    assert_same_bits(model, optimizer, twin, other)


def test_gradients_on_several_devices_are_scaled_where_they_are(monkeypatch):
    """A factor on one GPU cannot scale a gradient on another; the meta device stands for the other one."""
    scaled = []
    monkeypatch.setattr(
        torch, "_foreach_mul_", lambda own, factor: scaled.append(({x.device for x in own}, factor.device))
    )
    here, there = torch.ones(2), torch.ones(2, device="meta")
    torch_step._scale_([here, there, here], torch.tensor(0.5))
    assert sorted(map(str, scaled)) == sorted(str(({x.device}, x.device)) for x in (here, there))
