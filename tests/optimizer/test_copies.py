"""Copies of an optimizer, and the dry steps by which torch fills the state that a checkpoint is loaded into."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from molf import MoLF
from small import AllAlike, assert_same_bits, differing, routed_mlp, snapshot, train, zero_gradients


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
    model, optimizer = routed_mlp(dtype, **options)
    train(model, optimizer, steps)
    twin, other = copied((model, optimizer))
    assert other.routing is None if steps == 0 else other.routing.winners() == optimizer.routing.winners()
    assert {id(p) for g in other.param_groups for p in g["params"]} == {id(p) for p in twin.parameters()}
    rest = range(steps, steps + 3)
    assert train(model, optimizer, rest) == train(twin, other, rest)
    assert_same_bits(model, optimizer, twin, other)
    assert other.skipped_steps == 0
    before = snapshot(model, optimizer)
    train(twin, other, 1)
    assert not differing(before, snapshot(model, optimizer))


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_copy_has_the_same_ranks_and_a_pickle_says_that_it_has_not(tmp_path, caplog, in_backward):
    """The group holds this rank alone, so that it may step in backward; of all ranks there might be more."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        group = torch.distributed.new_group([0])
        model, optimizer = routed_mlp(process_group=group, optimizer_in_backward=in_backward)
        train(model, optimizer, 1)
        twin, other = copy.deepcopy((model, optimizer))
        assert other._process_group is optimizer._process_group is group and not caplog.records
        assert train(model, optimizer, range(1, 3)) == train(twin, other, range(1, 3))
        assert_same_bits(model, optimizer, twin, other)
        assert pickle.loads(pickle.dumps(optimizer))._process_group is None
        assert "leaves its process_group behind" in caplog.text
    finally:
        torch.distributed.destroy_process_group()


def dry_step(model, optimizer, zero=0.0):
    rates = [group["lr"] for group in optimizer.param_groups]
    zero_gradients(model)
    for group in optimizer.param_groups:
        group["lr"] = zero
    optimizer.step()
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = lr
    optimizer.zero_grad()


@pytest.mark.parametrize("dry", [dry_step, partial(dry_step, zero=torch.tensor(0.0)), get_optimizer_state_dict])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_dry_step_is_no_step(dry, dtype):
    model, optimizer = routed_mlp(dtype)
    twin, other = routed_mlp(dtype)
    dry(model, optimizer)
    assert optimizer.routing is None and optimizer.grad_norm is None
    assert all(state["step"] == 0 for state in optimizer.state.values() if "step" in state)
    assert all("exp_avg" in optimizer.state[p] for p in model.parameters())  # the purpose of a dry step
    assert train(model, optimizer, 4) == train(twin, other, 4)
    assert_same_bits(model, optimizer, twin, other)


def test_with_state_no_step_is_a_dry_step():
    """Whether gradients are zero is not checked then: on an accelerator that would sync."""
    model, optimizer = routed_mlp()
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
    model, optimizer = routed_mlp(dtype, **options)
    train(model, optimizer, 3)
    optimizer.zero_grad()
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=how))

    twin = copy.deepcopy(model)
    torch.manual_seed(99)
    other = MoLF(twin, ranks=(2, 3), lr=1e-2, lora_lr=2e-2, **options)
    set_optimizer_state_dict(twin, other, copy.deepcopy(saved), options=how)
    assert other.routing is None and other.skipped_steps == 0
    assert train(model, optimizer, range(3, 6)) == train(twin, other, range(3, 6))
    assert_same_bits(model, optimizer, twin, other)
