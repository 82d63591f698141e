"""Gradient release between steps: checkpoints, copies, and whose hooks act on a model."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from backward_steps import OPTIONS, assert_identical, pair_of
from molf import MoLF
from small import loss_of, mlp, train


@pytest.mark.parametrize("kind", ["bf16 split", "bf16 stochastic", "float32"])
def test_interrupted_and_resumed_is_uninterrupted(kind):
    dtype, options = OPTIONS[kind]
    model, optimizer, _, _ = pair_of(mlp(dtype), **options)
    train(model, optimizer, 3)
    resumed, other, _, _ = pair_of(mlp(dtype, seed=9), **options)
    train(resumed, other, 1)
    resumed.load_state_dict(copy.deepcopy(model.state_dict()))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(model, optimizer, range(3, 6)) == train(resumed, other, range(3, 6))
    assert_identical(model, optimizer, resumed, other)


def test_inside_a_step_a_state_is_loaded_but_not_saved():
    model, optimizer, _, _ = pair_of(mlp())
    state = copy.deepcopy(optimizer.state_dict())
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="between steps: call step"):
        optimizer.state_dict()
    with pytest.raises(RuntimeError, match="only consistent between steps"):
        copy.deepcopy(optimizer)
    optimizer.load_state_dict(state)  # ends the step
    assert optimizer.state_dict() and train(model, optimizer, 2)


def test_views_and_assignment():
    model, optimizer, twin, other = pair_of(mlp())
    for m, o in ((model, optimizer), (twin, other)):
        train(m, o, 2)
        expert = o.experts["1"]["lora_r2"]
        expert.assign(B=torch.ones(13, 2, dtype=torch.float64))
        train(m, o, range(2, 4))
    assert_identical(model, optimizer, twin, other)
    assert torch.equal(optimizer.experts["1"]["fft"].weight, other.experts["1"]["fft"].weight)


def test_distributed_checkpoint_functions():
    model, optimizer, twin, _ = pair_of(mlp())
    train(model, optimizer, 2)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    twin.load_state_dict(model.state_dict())
    other = MoLF(twin, ranks=(2, 3), lr=1e-2, lora_lr=2e-2, optimizer_in_backward=True)
    set_optimizer_state_dict(twin, other, saved)
    assert train(model, optimizer, range(2, 4)) == train(twin, other, range(2, 4))
    assert_identical(model, optimizer, twin, other)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_go_on_alike(copied):
    model, optimizer, _, _ = pair_of(mlp())
    train(model, optimizer, 2)
    twin, other = copied((model, optimizer))
    assert train(model, optimizer, range(2, 4)) == train(twin, other, range(2, 4))
    assert all(p.grad is None for p in twin.parameters())
    assert_identical(model, optimizer, twin, other)


def test_hooks_keep_nothing_alive_and_go_with_the_optimizer():
    model, optimizer, _, _ = pair_of(mlp())
    train(model, optimizer, 1)
    seen = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert seen() is None
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    loss_of(model, 1).backward()
    assert all(p.grad is not None for p in model.parameters())
    model_seen = weakref.ref(model)
    optimizer = MoLF(model, ranks=(2,), optimizer_in_backward=True)
    del model
    gc.collect()
    assert model_seen() is None and optimizer.param_groups


def on_meta(model):
    with torch.device("meta"):
        return mlp()


@pytest.mark.parametrize("before", [on_meta, lambda model: model], ids=["to_empty", "assign"])
def test_gradients_are_freed_after_parameters_were_replaced(before, caplog):
    """The first backward finds no hooks on them; ``step`` moves everything then."""
    source, twin = mlp(), mlp()
    model = before(mlp())
    made = []
    for m, in_backward in ((model, True), (twin, False)):
        torch.manual_seed(1)
        made.append(MoLF(m, ranks=(2, 3), lr=1e-2, optimizer_in_backward=in_backward))
    model.to_empty(device="cpu")
    model.load_state_dict({name: p.clone() for name, p in source.state_dict().items()}, assign=True)
    assert train(model, made[0], 1) == train(twin, made[1], 1)
    assert "freed from the next backward on" in caplog.text
    loss_of(model, 1).backward()
    assert all(p.grad is None for p in model.parameters())
    made[0].step()
    train(twin, made[1], range(1, 2))
    assert_identical(model, made[0], twin, made[1])


def test_reading_an_expert_finds_replaced_parameters_before_backward():
    model, optimizer, _, _ = pair_of(mlp())
    model.load_state_dict({name: p.clone() for name, p in model.state_dict().items()}, assign=True)
    assert optimizer.experts["1"]["fft"].weight.equal(model[1].weight)
    loss_of(model, 0).backward()
    assert all(p.grad is None for p in model.parameters())


def test_a_frozen_parameter_may_be_added():
    model, optimizer, _, _ = pair_of(mlp())
    frozen = torch.nn.Parameter(torch.ones(2, dtype=torch.float64), requires_grad=False)
    optimizer.add_param_group({"params": [frozen]})
    train(model, optimizer, 1)
    assert frozen.equal(torch.ones(2, dtype=torch.float64))
    frozen.requires_grad_(True)  # no hook waits for it, so step moves it
    (loss_of(model, 1) + frozen.sum()).backward()
    optimizer.step()
    assert (frozen < 1).all()


@pytest.mark.parametrize("in_backward", [True, False])
def test_a_later_optimizer_takes_the_model_over(in_backward):
    model, first, twin, _ = pair_of(mlp())
    for m in (model, twin):
        torch.manual_seed(1)
        second = MoLF(m, ranks=(2, 3), lr=1e-2, optimizer_in_backward=in_backward and m is model)
        train(m, second, 3)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    with pytest.raises(RuntimeError, match="another MoLF was built for this model"):
        first.step()
