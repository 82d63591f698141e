"""What an optimizer notices of changes in its model."""

import copy
import gc
import logging

import pytest
import torch
from peft import LoraConfig
from torch import nn

from molf import MoLF, add_lora_experts, param_groups
from small import loss_of, mlp, tiny_llama, train


@pytest.fixture(autouse=True)
def warnings_are_kept(caplog):
    caplog.set_level(logging.WARNING)


def told(caplog):
    messages = list(caplog.messages)
    caplog.clear()
    return messages


def unfreeze(model):
    model[4].requires_grad_(True)


def freeze_a_weight(model):
    model[1].weight.requires_grad_(False)
    model[1].weight.grad = None


def replace(model):
    model[1] = nn.Linear(7, 13).double()


def replace_by_another_shape(model):
    model[0] = nn.Embedding(20, 7).double()


def add(model):
    model.append(nn.Linear(3, 3).double())


NEW, GONE = "with a gradient, but in no group", "in a group, but no longer in the model"
CHANGES = {
    unfreeze: f": {NEW}: 4.weight. ",
    freeze_a_weight: ": with a gradient, but beside a routed weight without: 1.bias. ",
    replace: f": {NEW}: 1.weight, 1.bias; {GONE}: 1.weight, 1.bias. ",
    replace_by_another_shape: f": {NEW}: 0.weight; {GONE}: 0.weight. ",
    add: f": {NEW}: 6.weight, 6.bias. ",
}


@pytest.mark.parametrize(
    "edit", [lambda groups: groups.pop(0), lambda groups: groups.reverse()], ids=["pop", "reverse"]
)
def test_groups_that_were_edited_keep_their_parameters(edit):
    """All layers have the same shape, so that no parameter can be told from another by it."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = MoLF(model, ranks=(2,))
    edit(optimizer.param_groups)
    for group in optimizer.param_groups:
        weight = model.get_submodule(group["module"]).weight
        assert torch.equal(optimizer.experts[group["module"]]["fft"].weight, weight) and group["params"][0] is weight


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("change", CHANGES)
def test_the_next_step_names_what_changed_once(caplog, change, steps, release):
    model = mlp()
    model[4].requires_grad_(False)
    optimizer = MoLF(model, ranks=(2,), optimizer_in_backward=release)
    train(model, optimizer, steps)
    assert not told(caplog)
    change(model)
    train(model, optimizer, 1)
    (message,) = told(caplog)
    assert CHANGES[change] in message and "make a new optimizer, MoLF(model, ...)" in message
    train(model, optimizer, 3)
    assert not told(caplog)


def test_a_later_change_is_told_too(caplog):
    model = mlp()
    model[4].requires_grad_(False)
    optimizer = MoLF(model, ranks=(2,))
    for change in (unfreeze, replace):
        change(model)
        train(model, optimizer, 2)
        (message,) = told(caplog)
        assert CHANGES[change] in message


def test_zeroed_gradients_hide_no_layer_that_left(caplog):
    model = mlp()
    optimizer = MoLF(model, ranks=(2,))
    train(model, optimizer, 1)
    replace(model)
    optimizer.zero_grad(set_to_none=False)
    loss_of(model, 1).backward()
    optimizer.step()
    assert CHANGES[replace] in told(caplog)[0]


def test_many_names_are_counted(caplog):
    model = mlp()
    optimizer = MoLF(model, ranks=(2,), exclude_modules=())
    model.append(nn.Sequential(*(nn.Linear(3, 3).double() for _ in range(4))))
    train(model, optimizer, 1)
    assert f"{NEW}: 6.0.weight, 6.0.bias, 6.1.weight, 6.1.bias, 6.2.weight, ... (8). " in told(caplog)[0]


def test_another_adapter_of_peft(caplog):
    model = add_lora_experts(tiny_llama(), ranks=(2, 3), target_modules=["q_proj"])
    optimizer = MoLF(model)
    model.add_adapter("more", LoraConfig(r=4, target_modules=["q_proj"]))
    model.base_model.set_adapter(["lora_r2", "lora_r3", "more"])
    ids = torch.arange(12).view(1, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    (message,) = told(caplog)
    assert message.count("lora_A.more.weight") == 2 and GONE not in message


def test_nothing_changed(caplog):
    """Frozen parameters with gradients from before, tied and unused ones, and wrappers are no changes; nor are later groups."""
    model = mlp()
    model.unused, model.tied = nn.Linear(2, 2).double(), nn.ModuleList([model[3], model[4]])
    model.register_module("none", None)
    model.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    model.frozen.grad = torch.ones(2)
    compiled = torch.compile(model, backend="eager")
    optimizer = MoLF(compiled, ranks=(2,))
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2, dtype=torch.float64))]})
    train(model[:6], optimizer, 2)
    assert not told(caplog)


@pytest.mark.parametrize("unknown", ["groups", "copy", "gone"])
def test_without_its_model_an_optimizer_notices_nothing(caplog, unknown):
    model = mlp()
    optimizer = MoLF(param_groups(model, ranks=(2,))) if unknown == "groups" else MoLF(model, ranks=(2,))
    if unknown == "copy":
        model, optimizer = copy.deepcopy((model, optimizer))
    inner = model[:]
    if unknown == "gone":
        del model
        gc.collect()
        model = inner
    replace(model)
    train(model, optimizer, 1)
    assert not told(caplog)


def test_layers_of_another_shape_are_no_shards_of_the_old_ones(caplog):
    model = mlp()
    optimizer = MoLF(model, ranks=(2,))
    old = model[0].weight
    replace_by_another_shape(model)
    assert optimizer.experts["1"]["fft"].weight.shape == (13, 7)
    assert optimizer.param_groups[0]["params"][0] is old
    train(model, optimizer, 1)
    assert CHANGES[replace_by_another_shape] in told(caplog)[0]
