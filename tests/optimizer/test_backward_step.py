"""Gradient release against the ordinary step, which is tested against the oracle: the same bits on a CPU."""

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from backward_steps import OPTIONS, assert_identical, llama_steps, pair_of
from molf import MoLF, add_lora_experts
from small import differing, loss_of, mlp, snapshot, tiny_llama, train, wide


@pytest.mark.parametrize(("dtype", "options"), OPTIONS.values(), ids=OPTIONS.keys())
def test_release_equals_the_ordinary_step(dtype, options):
    model, optimizer, twin, other = pair_of(mlp(dtype), **options)
    schedulers = [CosineAnnealingLR(o, 6) for o in (optimizer, other)]
    for t in range(5):
        winners = train(model, optimizer, [t], schedulers[0])
        assert winners == train(twin, other, [t], schedulers[1])
        assert all(p.grad is None for p in model.parameters())
    assert_identical(model, optimizer, twin, other)
    assert optimizer.skipped_steps == 0


def test_eight_bit_moments():
    model, optimizer, twin, other = pair_of(wide(), optim_bits=8, lr=1e-3)
    for m, o in ((model, optimizer), (twin, other)):
        train(m, o, 3)
    assert all(p.grad is None for p in model.parameters())
    assert_identical(model, optimizer, twin, other)
    assert optimizer.state[model[1].weight]["exp_avg"].dtype == torch.uint8


@pytest.mark.parametrize("freeze_base", [True, False])
def test_adapters_as_experts(freeze_base):
    adapted = add_lora_experts(tiny_llama(torch.float64, attention_bias=True), ranks=(2, 6), freeze_base=freeze_base)
    model, optimizer, twin, other = pair_of(adapted, ranks=None, lr=2e-3, lora_lr=4e-3)
    assert llama_steps(model, optimizer) == llama_steps(twin, other)
    assert_identical(model, optimizer, twin, other)


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_a_tied_weight_moves_once_and_checkpointing_changes_nothing(reentrant):
    model, optimizer, twin, other = pair_of(tiny_llama(), lr=1e-3)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for m in (model, twin) if reentrant is not None else ():
        m.gradient_checkpointing_enable({"use_reentrant": reentrant})
        m.enable_input_require_grads()
        m.train()
    assert llama_steps(model, optimizer) == llama_steps(twin, other)
    assert_identical(model, optimizer, twin, other)
    assert optimizer.state[model.lm_head.weight]["step"] == 3


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model(backend):
    model, optimizer, twin, other = pair_of(mlp(torch.float32))
    for m, o in ((model, optimizer), (twin, other)):
        train(torch.compile(m, backend=backend), o, 3)
    assert_identical(model, optimizer, twin, other)


def test_a_kept_graph_and_two_passes_over_different_layers():
    model, optimizer, twin, other = pair_of(mlp())
    for m, o in ((model, optimizer), (twin, other)):
        loss_of(m, 0).backward(retain_graph=True)
        o.step()
        o.zero_grad()
        hidden = m[3](m[2](m[1](m[0](torch.arange(6)))))
        m[5](m[4](hidden.detach())).square().mean().backward()
        hidden.square().mean().backward()
        o.step()
    assert_identical(model, optimizer, twin, other)
    before, routing = snapshot(model, optimizer), optimizer.routing
    optimizer.step()  # without gradients
    assert not differing(before, snapshot(model, optimizer)) and optimizer.routing is routing


def partly(model, t, unused):
    """A loss that does not use all layers of an ``mlp``."""
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


def test_gradients_set_by_hand_are_used_by_step():
    model, optimizer, twin, other = pair_of(mlp())
    for m, o in ((model, optimizer), (twin, other)):
        train(m, o, 1)
        for p in m.parameters():
            p.grad = torch.full_like(p, 0.5)
        o.step()
    assert_identical(model, optimizer, twin, other)
    assert all(p.grad is None for p in model.parameters())


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


@pytest.mark.parametrize("form", ["merged", "branched"])
def test_only_one_layers_gradients_are_ever_there(form):
    model = tiny_llama(attention_bias=True)
    if form == "branched":
        model = add_lora_experts(model, ranks=(2, 3), freeze_base=False)
    layer_of, counts = {}, []

    def count_layers(_):  # comes before the optimizer's own hook
        alive = {layer_of[p] for p in model.parameters() if p.grad is not None}
        counts.append(len(alive))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(count_layers)
    optimizer = MoLF(model, **({"ranks": (2,)} if form == "merged" else {}), optimizer_in_backward=True)
    for i, group in enumerate(optimizer.param_groups):
        layer_of |= {p: i if "module" in group else p for p in group["params"]}
    for t in range(2):
        ids = torch.randint(0, 40, (3, 9), generator=torch.Generator().manual_seed(t))
        model(input_ids=ids, labels=ids).loss.backward()
        assert all(p.grad is None for p in model.parameters())
        optimizer.step()
    assert len(counts) == 2 * len(layer_of) and max(counts) == 1
