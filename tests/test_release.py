"""Gradient release against the ordinary step, which is tested against the oracle: the same bits on a CPU."""

import copy
import gc
import logging
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.checkpoint import checkpoint

from molf import MoLF, add_lora_experts
from molf.distributed import Ranks
from small import Prefer, differing, loss_of, mlp, snapshot, tiny_llama, train, wide


def pair_of(model, **options):
    """A model whose optimizer releases gradients, and a copy whose optimizer does not."""
    twin, made = copy.deepcopy(model), []
    options = {"ranks": (2, 3), "lr": 1e-2, "lora_lr": 2e-2, **options}
    for m, released in ((model, True), (twin, False)):
        torch.manual_seed(1)
        made.append(MoLF(m, optimizer_in_backward=released, **options))
    return model, made[0], twin, made[1]


def assert_identical(model, optimizer, twin, other):
    assert not differing(snapshot(model, optimizer), snapshot(twin, other))
    assert optimizer.routing.modules == other.routing.modules
    assert torch.equal(optimizer.routing.scores, other.routing.scores)
    assert torch.equal(optimizer.routing.chosen, other.routing.chosen)
    # The norm is put together in another order.
    torch.testing.assert_close(optimizer.grad_norm.double(), other.grad_norm.double(), rtol=1e-12, atol=0)


def llama_steps(model, optimizer, steps=3):
    winners = []
    for t in range(steps):
        ids = torch.randint(0, 40, (3, 9), generator=torch.Generator().manual_seed(t))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        winners.append(optimizer.routing.winners())
    return winners


# --- the same step ----------------------------------------------------------------------------------------------------

OPTIONS = {
    "epd": (torch.float64, {}),
    "pfn, two winners": (torch.float64, {"score": "pfn", "top_k": 2}),
    "lora everywhere": (torch.float64, {"score": Prefer(1)}),
    "adamw": (torch.float64, {"ranks": ()}),
    "float32": (torch.float32, {}),
    "bf16 split": (torch.bfloat16, {}),
    "bf16 stochastic": (torch.bfloat16, {"bf16_update": "stochastic", "top_k": 2}),
}


@pytest.mark.parametrize(("dtype", "options"), OPTIONS.values(), ids=OPTIONS.keys())
def test_released_equals_ordinary(dtype, options):
    model, optimizer, twin, other = pair_of(mlp(dtype), **options)
    schedulers = [CosineAnnealingLR(o, 6) for o in (optimizer, other)]
    for t in range(5):
        released = train(model, optimizer, range(t, t + 1), schedulers[0])
        assert released == train(twin, other, range(t, t + 1), schedulers[1])
        assert all(p.grad is None for p in model.parameters())
    assert_identical(model, optimizer, twin, other)
    assert optimizer.skipped_steps == 0


def test_eight_bit_moments():
    model, optimizer, twin, other = pair_of(wide(), optim_bits=8, lr=1e-3)
    for t in range(3):
        ids = torch.randint(0, 16, (4, 6), generator=torch.Generator().manual_seed(t))
        for m, o in ((model, optimizer), (twin, other)):
            o.zero_grad()
            m(ids).square().mean().backward()
            o.step()
    assert_identical(model, optimizer, twin, other)
    assert optimizer.state[model[1].weight]["exp_avg"].dtype == torch.uint8


@pytest.mark.parametrize("freeze_base", [True, False])
def test_adapters_as_experts(freeze_base):
    adapted = add_lora_experts(tiny_llama(torch.float64, attention_bias=True), ranks=(2, 6), freeze_base=freeze_base)
    model, optimizer, twin, other = pair_of(adapted, ranks=None, lr=2e-3, lora_lr=4e-3)
    assert llama_steps(model, optimizer) == llama_steps(twin, other)
    assert_identical(model, optimizer, twin, other)


def test_a_tied_weight_moves_once():
    model, optimizer, twin, other = pair_of(tiny_llama(), lr=1e-3)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert llama_steps(model, optimizer) == llama_steps(twin, other)
    assert_identical(model, optimizer, twin, other)
    assert optimizer.state[model.lm_head.weight]["step"] == 3


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model, optimizer, twin, other = pair_of(tiny_llama(), lr=1e-3)
    for m in (model, twin):
        m.gradient_checkpointing_enable({"use_reentrant": reentrant})
        m.enable_input_require_grads()
        m.train()
    assert llama_steps(model, optimizer) == llama_steps(twin, other)
    assert_identical(model, optimizer, twin, other)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model(backend):
    model, optimizer, twin, other = pair_of(mlp(torch.float32))
    compiled, twin_compiled = torch.compile(model, backend=backend), torch.compile(twin, backend=backend)
    for t in range(3):
        for m, o in ((compiled, optimizer), (twin_compiled, other)):
            loss_of(m, t).backward()
            o.step()
            o.zero_grad()
    assert_identical(model, optimizer, twin, other)


def test_a_graph_that_is_kept():
    model, optimizer, twin, other = pair_of(mlp())
    for m, o in ((model, optimizer), (twin, other)):
        for t in range(2):
            loss_of(m, t).backward(retain_graph=True)
            o.step()
            o.zero_grad()
    assert_identical(model, optimizer, twin, other)


def partly(model, t, unused):
    """A loss that leaves layers of an ``mlp`` out."""
    ids = torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(t))
    x = model[2](nn.functional.linear(model[0](ids), model[1].weight.detach(), model[1].bias))
    if unused == "weight":
        return x.square().mean()
    return model[1](model[0](ids)).square().mean()


@pytest.mark.parametrize("unused", ["weight", "later layers"])
def test_layers_that_get_no_gradient_or_only_a_part_of_it(unused):
    model, optimizer, twin, other = pair_of(mlp())
    for m, o in ((model, optimizer), (twin, other)):
        train(m, o, 2)
        o.zero_grad()
        partly(m, 2, unused).backward()
        o.step()
        assert unused == "weight" or o.routing.modules == ("1",)
        o.zero_grad()
        train(m, o, range(3, 5))
    assert_identical(model, optimizer, twin, other)
    assert optimizer.state[model[4].weight]["step"] == 4


def test_gradients_that_come_in_two_passes_over_different_layers():
    model, optimizer, twin, other = pair_of(mlp())
    for m, o in ((model, optimizer), (twin, other)):
        ids = torch.arange(6)
        hidden = m[3](m[2](m[1](m[0](ids))))
        m[5](m[4](hidden.detach())).square().mean().backward()
        hidden.square().mean().backward()
        o.step()
    assert_identical(model, optimizer, twin, other)


def test_gradients_set_by_hand_are_taken_by_step():
    model, optimizer, twin, other = pair_of(mlp())
    for m, o in ((model, optimizer), (twin, other)):
        train(m, o, 1)
        for p in m.parameters():
            p.grad = torch.full_like(p, 0.5)
        o.step()
    assert_identical(model, optimizer, twin, other)
    assert all(p.grad is None for p in model.parameters())


def test_a_step_without_gradients_changes_nothing():
    model, optimizer, _, _ = pair_of(mlp())
    train(model, optimizer, 1)
    before, routing = snapshot(model, optimizer), optimizer.routing
    optimizer.step()
    assert not differing(before, snapshot(model, optimizer))
    assert optimizer.routing is routing


def test_torch_autograd_grad_moves_nothing():
    model, optimizer, _, _ = pair_of(mlp())
    before = [p.detach().clone() for p in model.parameters()]
    torch.autograd.grad(loss_of(model, 0), list(model.parameters()))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_group_that_was_added_later():
    model, optimizer, _, _ = pair_of(mlp())
    extra = nn.Parameter(torch.ones(3, 3, dtype=torch.float64))
    optimizer.add_param_group({"params": [extra]})
    (extra.square().sum() + loss_of(model, 0)).backward()
    assert extra.grad is None and (extra < 1).all()
    optimizer.step()


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["merged", "branched"])
def test_only_one_layers_gradients_are_ever_there(form):
    model = tiny_llama(attention_bias=True)
    if form == "branched":
        model = add_lora_experts(model, ranks=(2, 3), freeze_base=False)
    layer_of, most = {}, []

    def look(_):  # comes before the optimizer's own hook
        alive = {layer_of[p] for p in model.parameters() if p.grad is not None}
        most.append(len(alive))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(look)
    optimizer = MoLF(model, **({"ranks": (2,)} if form == "merged" else {}), optimizer_in_backward=True)
    for i, group in enumerate(optimizer.param_groups):
        layer_of |= {p: i if "module" in group else p for p in group["params"]}
    for t in range(2):
        ids = torch.randint(0, 40, (3, 9), generator=torch.Generator().manual_seed(t))
        model(input_ids=ids, labels=ids).loss.backward()
        assert all(p.grad is None for p in model.parameters())
        optimizer.step()
    assert len(most) == 2 * len(layer_of) and max(most) == 1


# --- resuming and copies ----------------------------------------------------------------------------------------------


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


def test_no_checkpoint_inside_a_step():
    model, optimizer, _, _ = pair_of(mlp())
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="between steps only: call step"):
        optimizer.state_dict()
    with pytest.raises(RuntimeError, match="between steps only"):
        copy.deepcopy(optimizer)
    optimizer.step()
    optimizer.state_dict()


def test_loading_ends_the_step_under_way():
    model, optimizer, _, _ = pair_of(mlp())
    train(model, optimizer, 1)
    state = copy.deepcopy(optimizer.state_dict())
    loss_of(model, 1).backward()
    optimizer.load_state_dict(state)
    assert train(model, optimizer, range(1, 3))


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


# --- whose hooks act --------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("released", [True, False])
def test_a_later_optimizer_takes_the_model_over(released):
    model, first, twin, _ = pair_of(mlp())
    for m in (model, twin):
        torch.manual_seed(1)
        second = MoLF(m, ranks=(2, 3), lr=1e-2, optimizer_in_backward=released and m is model)
        train(m, second, 3)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    with pytest.raises(RuntimeError, match="another MoLF was made for this model"):
        first.step()


# --- gradients that are not finite ------------------------------------------------------------------------------------


def test_a_layer_with_a_bad_gradient_is_left_out_alone(caplog):
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
    assert "1 of 6 layers and other parameters left out of a step, 4 first" in caplog.text
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


# --- what can't be had ------------------------------------------------------------------------------------------------


def test_clipping_is_refused():
    with pytest.raises(
        ValueError, match=r"max_grad_norm=1\.0 can't be had, which needs the norm of all gradients first"
    ):
        MoLF(mlp(), ranks=(2,), max_grad_norm=1.0, optimizer_in_backward=True)


def test_clipping_that_is_asked_for_later_is_refused():
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
    with pytest.raises(RuntimeError, match="come twice|modified by an inplace operation"):
        loss.backward()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))
    assert optimizer.routing is None


def test_accumulation_is_refused_before_anything_moves_twice():
    model, optimizer, _, _ = pair_of(mlp())
    loss_of(model, 0).backward()
    weights = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"come twice since the last optimizer\.step\(\): call step\(\) after every"):
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


def test_a_loss_scale_is_refused():
    model, optimizer, _, _ = pair_of(mlp(torch.float32))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(loss_of(model, 0)).backward()
    with pytest.raises(ValueError, match="a GradScaler's loss scale can't be divided out first"):
        scaler.step(optimizer)


def test_a_closure_is_refused():
    model, optimizer, _, _ = pair_of(mlp())
    with pytest.raises(ValueError, match=r"step\(\) takes no closure"):
        optimizer.step(lambda: loss_of(model, 0))


def test_ranks_that_appear_later_are_refused(monkeypatch):
    model, _, _, _ = pair = pair_of(mlp())
    weights = [p.detach().clone() for p in model.parameters()]
    monkeypatch.setattr("molf.optimizer.find_ranks", lambda groups, group: Ranks(alike=("a group",)))
    with pytest.raises(ValueError, match="can't be summed over ranks first"):
        loss_of(model, 0).backward()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))
    assert len(pair) == 4  # the optimizer is alive


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_wrapped_in_ddp_is_refused(one_rank):
    model = nn.parallel.DistributedDataParallel(mlp())
    with pytest.raises(ValueError, match="can't be summed over ranks first"):
        MoLF(model, ranks=(2,), optimizer_in_backward=True)
