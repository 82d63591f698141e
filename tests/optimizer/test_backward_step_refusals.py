"""What gradient release skips, and what it refuses."""

import logging

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from backward_steps import pair_of
from molf import MoLF
from molf.numerics.distributed import Ranks
from small import differing, loss_of, mlp, snapshot, train


def test_a_layer_with_a_bad_gradient_is_skipped_alone(caplog):
    model, optimizer, twin, other = pair_of(mlp(torch.float32))
    for m, o in ((model, optimizer), (twin, other)):
        train(m, o, 2)
    before = snapshot(model, optimizer)
    spoil = model[4].weight.register_hook(lambda grad: grad * float("nan"))
    with caplog.at_level(logging.WARNING, logger="molf"):
        train(model, optimizer, range(2, 3))
    train(twin, other, range(2, 3))
    spoil.remove()
    after, unspoilt = snapshot(model, optimizer), snapshot(twin, other)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    number = next(i for i, p in enumerate(params) if p is model[4].weight)
    own = {k for k in after if k == "model.4.weight" or k.startswith(f"state.{number}.")}
    assert not differing(before, after) & own
    assert {"model.4.weight"} <= differing(after, unspoilt) <= own
    assert optimizer.routing.modules == ("1", "5")
    assert not optimizer.grad_norm.isfinite()
    assert optimizer.skipped_steps == 1
    assert "Skipped 1 of 6 layers and other parameters, the first is 4" in caplog.text
    train(model, optimizer, range(3, 5))
    assert optimizer.routing.modules == ("1", "4", "5") and optimizer.skipped_steps == 1


def test_a_step_with_nothing_but_bad_gradients(caplog):
    model, optimizer, _, _ = pair_of(mlp())
    train(model, optimizer, 1)
    before, routing = snapshot(model, optimizer), optimizer.routing
    (loss_of(model, 1) * float("inf")).backward()
    optimizer.step()
    assert not differing(before, snapshot(model, optimizer))
    assert optimizer.routing is routing and optimizer.skipped_steps == 1
    assert len(caplog.records) == 1


def test_a_score_that_compares_modules_is_refused():
    with pytest.raises(ValueError, match=r"a score that compares modules \(shuffled\) is impossible"):
        MoLF(mlp(), ranks=(2,), score="shuffled", optimizer_in_backward=True)


def test_clipping_is_refused():
    with pytest.raises(ValueError, match=r"max_grad_norm=1\.0 is impossible, which needs the norm of all gradients f"):
        MoLF(mlp(), ranks=(2,), max_grad_norm=1.0, optimizer_in_backward=True)
    model, optimizer, _, _ = pair_of(mlp())
    optimizer.max_grad_norm = 1.0
    with pytest.raises(ValueError, match="max_grad_norm"):
        loss_of(model, 0).backward()


def test_one_graph_twice_in_a_step_is_refused():
    model, optimizer, _, _ = pair_of(mlp())
    loss = loss_of(model, 0)
    loss.backward(retain_graph=True)
    weights = [p.detach().clone() for p in model.parameters()]
    # Whoever notices first: the optimizer, or autograd, whose weights have moved.
    with pytest.raises(RuntimeError, match="came twice|modified by an inplace operation"):
        loss.backward()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))
    assert optimizer.routing is None


def test_accumulation_is_refused_before_anything_moves_twice():
    model, optimizer, _, _ = pair_of(mlp())
    loss_of(model, 0).backward()
    weights = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"came twice since the last optimizer\.step\(\): call step\(\) after every"):
        loss_of(model, 1).backward()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))
    with pytest.raises(RuntimeError, match="has one after it has moved"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.routing.modules == ("1", "4", "5")
    train(model, optimizer, range(1, 3))


def test_a_weight_in_two_segments_of_reentrant_checkpointing():
    model = mlp()
    optimizer = MoLF(model, ranks=(2,), optimizer_in_backward=True)
    x = model[0](torch.arange(6))

    def twice(x):
        return x @ model[1].weight.T @ model[1].weight

    with pytest.raises(RuntimeError, match="let no two segments of reentrant checkpointing share a weight"):
        checkpoint(twice, checkpoint(twice, x, use_reentrant=True), use_reentrant=True).sum().backward()
    assert optimizer.routing is None


def test_a_loss_scale_and_a_closure_are_refused():
    model, optimizer, _, _ = pair_of(mlp(torch.float32))
    with pytest.raises(ValueError, match=r"step\(\) takes no closure"):
        optimizer.step(lambda: loss_of(model, 0))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(loss_of(model, 0)).backward()
    with pytest.raises(ValueError, match="a GradScaler's loss scale cannot be divided out first"):
        scaler.step(optimizer)


def test_ranks_that_appear_later_are_refused(monkeypatch):
    model, optimizer, _, _ = pair_of(mlp())
    weights = [p.detach().clone() for p in model.parameters()]
    monkeypatch.setattr("molf.optimizer.optimizer.find_ranks", lambda groups, group: Ranks(replica_groups=("a group",)))
    with pytest.raises(ValueError, match="cannot be summed over ranks first"):
        loss_of(model, 0).backward()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))
    assert optimizer.routing is None


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_wrapped_in_ddp_is_refused(one_rank):
    model = nn.parallel.DistributedDataParallel(mlp())
    with pytest.raises(ValueError, match="cannot be summed over ranks first"):
        MoLF(model, ranks=(2,), optimizer_in_backward=True)
