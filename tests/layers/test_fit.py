"""State and gradients that do not fit their parameter any more are refused before anything moves, on every path of a step."""

import importlib.util
import itertools
import re

import pytest
import torch
from torch import nn

from molf import MoLF, add_lora_experts
from molf.errors import MolfError
from molf.setup.param_groups import param_groups
from small import differing, loss_of, mlp, snapshot, tiny_llama, train, wide

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
PATHS = {
    "float64": (mlp, torch.float64, {}),
    "float32": (mlp, torch.float32, {"max_grad_norm": 1.0}),
    "bf16 split": (mlp, torch.bfloat16, {}),
    "bf16 stochastic": (mlp, torch.bfloat16, {"bf16_update": "stochastic"}),
    "8 bits": (wide, torch.float32, {"optim_bits": 8}),
    "release": (mlp, torch.float32, {"optimizer_in_backward": True}),
    "kernels": (mlp, torch.float32, {"fused": True}),
}
PATHS = {
    name: pytest.param(*path, id=name, marks=needs_triton if "kernels" in name else ()) for name, path in PATHS.items()
}


def grown(x):
    return torch.cat([x, torch.ones_like(x[:1])])


def shrunk(x):
    return x[:-1].clone()


def set_gradients(model):
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.ones_like(p)


def stepped(build, dtype, options):
    model = build(dtype)
    optimizer = MoLF(model, ranks=(2, 3), **options)
    set_gradients(model)
    optimizer.step()
    return model, optimizer


def assert_refused(model, optimizer, words, act=None):
    before = snapshot(model, optimizer)
    with pytest.raises(MolfError, match=words):
        (act or optimizer.step)()
    assert not differing(before, snapshot(model, optimizer))


@pytest.mark.parametrize(("build", "dtype", "options"), PATHS.values())
def test_a_parameter_of_another_shape_is_refused(build, dtype, options):
    """Embedding, norm, routed weight and bias; afterwards the optimizer goes on with the old shapes."""
    model, optimizer = stepped(build, dtype, options)
    for name, change in itertools.product(("0.weight", "3.weight", "4.weight", "5.bias"), (grown, shrunk)):
        p = model.get_parameter(name)
        old, p.grad = p.data, None
        p.data = change(p.data)
        set_gradients(model)
        words = f"state of {name} is {list(old.shape)}, and the parameter is {list(p.shape)}: its memory was replaced"
        assert_refused(model, optimizer, re.escape(words))
        p.grad, p.data = None, old
    set_gradients(model)
    optimizer.step()
    assert optimizer.skipped_steps == 0


def test_another_shape_is_refused_inside_backward():
    model, optimizer = stepped(mlp, torch.float64, {"optimizer_in_backward": True})
    model[0].weight.data = grown(model[0].weight.data)
    assert_refused(model, optimizer, r"0\.weight is \[11, 7\].*\[12, 7\]", lambda: loss_of(model, 1).backward())


def test_memory_replaced_between_forward_and_the_first_backward():
    """Autograd then leaves a gradient of the old shape."""
    model = mlp()
    optimizer = MoLF(model, ranks=(2,), optimizer_in_backward=True)
    loss = loss_of(model, 0)
    weight = model[0].weight
    weight.data = grown(weight.data)
    before = weight.detach().clone()
    with pytest.raises(MolfError, match=r"gradient of 0\.weight is \[11, 7\], and the parameter is \[12, 7\]"):
        loss.backward()
    assert torch.equal(weight, before) and weight not in optimizer.state


@pytest.mark.parametrize(("build", "dtype", "options"), PATHS.values())
def test_a_stale_gradient_is_refused(build, dtype, options):
    """Before the first step, when there is no state that would not fit."""
    model = build(dtype)
    optimizer = MoLF(model, ranks=(2, 3), **options)
    set_gradients(model)
    weight = model[4].weight
    weight.data = grown(weight.data)
    words = r"the gradient of 4\.weight is \[\d+, \d+\], and the parameter is .*zero_grad\(\) and backward again"
    assert_refused(model, optimizer, words)


def test_a_stale_gradient_beside_state_that_fits_is_refused():
    model, optimizer = stepped(mlp, torch.float32, {})
    weight = model[4].weight
    old, weight.grad, weight.data = weight.data, None, grown(weight.data)
    set_gradients(model)
    weight.data = old
    assert_refused(model, optimizer, r"the gradient of 4\.weight is \[6, 13\], and the parameter is \[5, 13\]")


@pytest.mark.parametrize("leaf", ["q_proj.lora_A.lora_r2", "v_proj.lora_B.lora_r3", "o_proj.base_layer"])
def test_branched_experts(leaf):
    model = add_lora_experts(tiny_llama(), ranks=(2, 3), freeze_base=False)
    optimizer = MoLF(model)
    set_gradients(model)
    optimizer.step()
    name = f"base_model.model.model.layers.1.self_attn.{leaf}.weight"
    p = model.get_parameter(name)
    p.grad, p.data = None, grown(p.data)
    set_gradients(model)
    assert_refused(model, optimizer, f"state of {name} is ")


def test_resizing_the_embeddings_of_a_model():
    model = tiny_llama()
    optimizer = MoLF(model, ranks=(2,))
    ids = torch.arange(12).view(1, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.resize_token_embeddings(50, mean_resizing=False)
    assert_refused(model, optimizer, r"model\.embed_tokens\.weight is \[40, 16\].*is \[50, 16\].*MoLF\(model")
    with pytest.raises(MolfError, match=r"is \[50, 16\] here and \[40, 16\] in the state"):
        MoLF(model, ranks=(2,)).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("was", "now", "words"),
    [
        (torch.float32, torch.float64, r"0\.weight is torch\.float64, .* for float32 weights: the model was cast"),
        (torch.float64, torch.float32, "for float64 weights"),
        (torch.bfloat16, torch.float32, "for bfloat16 weights"),
        (torch.float64, torch.bfloat16, "for float64 weights"),
        (torch.float32, torch.float16, r"0\.weight is torch\.float16: train float32 weights"),
        (torch.float32, torch.bfloat16, None),  # goes on from the rounded weights, as after loading
    ],
    ids=str,
)
def test_a_model_that_was_cast_is_refused_or_works(was, now, words):
    model, optimizer = stepped(mlp, was, {})
    model.to(now)
    set_gradients(model)
    if words is not None:
        return assert_refused(model, optimizer, words)
    optimizer.step()
    assert all("low" in own for own in optimizer.state.values())


def test_half_precision_before_the_first_step():
    model = mlp(torch.float32)
    optimizer = MoLF(model, ranks=(2,))
    model.half()
    set_gradients(model)
    assert_refused(model, optimizer, r"0\.weight is torch\.float16: train float32")


def test_codes_are_not_for_float64_weights():
    model, optimizer = stepped(wide, torch.float32, {"optim_bits": 8})
    model.double()
    set_gradients(model)
    assert_refused(model, optimizer, "is torch.float64, and .* for float32 weights")


def test_memory_in_another_order_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer = MoLF(model, ranks=(2,))
    set_gradients(model)
    optimizer.step()
    model[0].weight.data = model[0].weight.data.T
    assert_refused(model, optimizer, r"0\.weight is not contiguous in memory")


def test_state_on_another_device_is_refused():
    model, optimizer = stepped(mlp, torch.float32, {})
    own = optimizer.state[model[4].weight]
    own["exp_avg"] = own["exp_avg"].to("meta")
    with pytest.raises(MolfError, match=r"state of 4\.weight is on meta, and the parameter on cpu.*load_state_dict"):
        optimizer.step()


def test_views_refuse_too():
    model, optimizer = stepped(mlp, torch.float32, {})
    model[1].weight.data = grown(model[1].weight.data)
    with pytest.raises(MolfError, match=r"1\.weight is \[13, 7\].*\[14, 7\]"):
        _ = optimizer.experts["1"]["fft"].weight
    assert optimizer.experts["4"]["fft"].weight.shape == (5, 13)


def test_without_a_model_the_place_in_the_groups_is_named():
    model = mlp()
    optimizer = MoLF(param_groups(model, ranks=(2,)))
    train(model, optimizer, 1)
    for name, where in (("3.weight", "parameter 0 of group 1"), ("5.bias", "parameter 1 of 5")):
        p = model.get_parameter(name)
        old, p.data, p.grad = p.data, grown(p.data), None
        assert_refused(model, optimizer, f"state of {where} is ")
        p.data = old


def test_only_what_is_missing_is_looked_at_twice():
    """Parameters that never get a gradient need no state, and keep no group from being complete."""
    model = mlp()
    model.unused = nn.Parameter(torch.ones(2, 2))
    optimizer = MoLF(model, ranks=(2,))
    train(model, optimizer, 2)
    assert model.unused not in optimizer.state
    model.unused.grad = torch.ones(2, 2)
    optimizer.step()
    assert float(optimizer.state[model.unused]["step"]) == 1


@pytest.mark.parametrize("emptied", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_flattened_parameters_are_refused(adapted, emptied):
    """DeepSpeed's ZeRO puts one flat piece in place of all parameters of a group, or nothing; FSDP1 flattens each."""
    model = add_lora_experts(tiny_llama(), ranks=(2, 4)) if adapted else tiny_llama()
    optimizer = MoLF(model) if adapted else MoLF(model, ranks=(2,))
    for group in optimizer.param_groups:
        group["params"] = [nn.Parameter(torch.cat([p.detach().flatten() for p in group["params"]]))][emptied:]
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    with pytest.raises(MolfError, match=r"q_proj were flattened into \[\d*\], as DeepSpeed's ZeRO.*FSDP2 instead"):
        optimizer.step()


def test_groups_that_are_stepped_one_by_one_are_refused():
    """As DeepSpeed's ZeRO-2 does, the ordinary ones first."""
    optimizer = MoLF(tiny_llama(), ranks=(2,))
    optimizer.param_groups = optimizer.param_groups[:1]
    with pytest.raises(
        MolfError, match=r"groups of the routed layers are gone, which DeepSpeed's ZeRO .*FSDP2 instead"
    ):
        optimizer.step()
