import copy

import pytest
import torch

from conftest import TOLERANCE
from molf import MoLF, add_lora_experts
from molf.setup.param_groups import level_scales
from small import loss_of, mlp, tiny_llama, train


def built(dtype=torch.float64, steps=4, **options):
    model = mlp(dtype)
    torch.manual_seed(1)
    optimizer = MoLF(model, **{"ranks": (2, 3), "top_k": 3, "lr": 1e-2, **options})
    train(model, optimizer, steps)
    return model, optimizer


def total(experts):
    fft, *pairs = experts.values()
    return fft.weight + sum(pair.scale * pair.B @ pair.A for pair in pairs)


def test_experts_by_module_and_name():
    optimizer = MoLF(tiny_llama(), ranks=(2, 3))
    assert len(optimizer.experts) == 14
    assert list(optimizer.experts)[0] == "model.layers.0.self_attn.q_proj"
    assert list(optimizer.experts["model.layers.1.mlp.up_proj"]) == ["fft", "lora_r2", "lora_r3"]
    assert list(MoLF(mlp(), ranks=()).experts["1"]) == ["fft"]
    assert "1" not in optimizer.experts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_before_the_first_step_the_base_is_the_model(dtype):
    model, optimizer = built(dtype, steps=0)
    assert torch.equal(optimizer.experts["1"]["fft"].weight, model[1].weight)
    assert not optimizer.experts["1"]["lora_r2"].B.any()
    assert optimizer.routing is None


def test_shapes_and_scale():
    _, optimizer = built()
    own = optimizer.experts["1"]
    assert own["fft"].weight.shape == (13, 7) and own["fft"].bias.shape == (13,)
    assert own["lora_r3"].A.shape == (3, 7) and own["lora_r3"].B.shape == (13, 3)
    assert own["lora_r3"].scale == pytest.approx(level_scales((3,), 7)[0])
    assert optimizer.experts["4"]["fft"].bias is None


def test_repr():
    _, optimizer = built()
    assert repr(optimizer.experts["4"]["lora_r2"]) == "LoraExpert('4', 'lora_r2')"
    assert repr(optimizer.experts["4"]["fft"]) == "FftExpert('4', 'fft')"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_experts_add_up_to_the_models_weight(dtype):
    model, optimizer = built(dtype)
    for name, experts in optimizer.experts.items():
        weight = model.get_submodule(name).weight.detach()
        torch.testing.assert_close(total(experts), weight, rtol=0, atol=TOLERANCE[dtype])


def test_reading_before_the_first_step_changes_nothing():
    (model, optimizer), (twin, other) = (built(steps=0, ranks=(2,), top_k=1) for _ in range(2))
    assert [experts["lora_r2"].A.shape[0] for experts in optimizer.experts.values()] == [2, 2, 2]
    assert train(model, optimizer, 4) == train(twin, other, 4)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_views_stay_right_after_loading():
    model, optimizer = built()
    view = optimizer.experts["1"]["lora_r2"]
    saved, A = copy.deepcopy(optimizer.state_dict()), view.A.clone()
    train(model, optimizer, range(4, 6))
    assert not torch.equal(view.A, A)
    optimizer.load_state_dict(saved)
    assert torch.equal(view.A, A)


@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize("leaves", ["A", "B", "AB"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_assigning_a_pair_keeps_the_base(steps, leaves, dtype):
    model, optimizer = built(dtype, steps)
    experts = optimizer.experts["1"]
    base, others = experts["fft"].weight, [experts["lora_r2"].A.clone(), experts["lora_r2"].B.clone()]
    values = {leaf: torch.randn_like(getattr(experts["lora_r3"], leaf)) for leaf in leaves}
    experts["lora_r3"].assign(**values)
    atol = 1e-10 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(experts["fft"].weight, base, rtol=0, atol=atol)
    for leaf, value in values.items():
        assert torch.equal(getattr(experts["lora_r3"], leaf), value)
    assert torch.equal(experts["lora_r2"].A, others[0]) and torch.equal(experts["lora_r2"].B, others[1])
    tolerance = {"rtol": 2**-8, "atol": 1e-4} if dtype == torch.bfloat16 else {"rtol": 0, "atol": atol}
    torch.testing.assert_close(model[1].weight.detach().to(base.dtype), total(experts), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_assigning_the_base_keeps_the_pairs(dtype):
    model, optimizer = built(dtype)
    experts = optimizer.experts["1"]
    pairs = [x.clone() for name in ("lora_r2", "lora_r3") for x in (experts[name].A, experts[name].B)]
    weight, bias = torch.randn(13, 7, dtype=torch.float64), torch.randn(13, dtype=torch.float64)
    experts["fft"].assign(weight=weight, bias=bias)
    atol = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(experts["fft"].weight.double(), weight, rtol=0, atol=atol)
    torch.testing.assert_close(experts["fft"].bias, bias.to(dtype), rtol=0, atol=0)
    now = [x for name in ("lora_r2", "lora_r3") for x in (experts[name].A, experts[name].B)]
    assert all(torch.equal(x, y) for x, y in zip(pairs, now, strict=True))
    loss_of(model, 0).backward()


def test_assigning_a_bf16_bias_resets_its_low_part():
    """0.0 with an old negative low part would be a NaN."""
    model = mlp(torch.bfloat16)
    optimizer = MoLF(model, ranks=(), lr=1e-3)
    train(model, optimizer, 5)
    optimizer.experts["1"]["fft"].assign(bias=torch.zeros(13))
    model[1].bias.grad = torch.ones_like(model[1].bias)
    model[1].weight.grad = torch.ones_like(model[1].weight)
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p]["exp_avg"].zero_()
    optimizer.step()
    assert (model[1].bias < 0).all()


def test_assigning_one_matrix_of_a_bf16_adapter_leaves_the_other_with_its_low_part():
    model = add_lora_experts(tiny_llama(), ranks=(2, 4)).bfloat16()
    optimizer = MoLF(model, lr=1e-3)
    ids = torch.arange(12).view(1, 12)
    for _ in range(2):  # B is zero at first
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    A, B, *_ = next(group["params"] for group in optimizer.param_groups if "module" in group)
    for other, given in ((A, "B"), (B, "A")):
        optimizer.state[other]["low"].fill_(7)
        pair = optimizer.experts[next(iter(optimizer.experts))]["lora_r2"]
        pair.assign(**{given: torch.full_like(getattr(pair, given), 0.5)})
        assert (getattr(pair, given) == 0.5).all() and (optimizer.state[other]["low"] == 7).all()


@pytest.mark.parametrize(
    ("expert", "values", "words"),
    [
        ("lora_r2", {"A": torch.zeros(7, 2)}, r"1 lora_r2\.A has shape \[7, 2\], it must be \[2, 7\]"),
        ("lora_r2", {"B": torch.zeros(13)}, r"1 lora_r2\.B has shape \[13\], it must be \[13, 2\]"),
        ("lora_r2", {"A": torch.ones(2, 7), "B": torch.zeros(1, 2)}, r"lora_r2\.B has shape"),
        ("fft", {"weight": torch.zeros(7, 13)}, r"1 weight has shape \[7, 13\], it must be \[13, 7\]"),
        ("fft", {"weight": torch.zeros(13, 7), "bias": torch.zeros(12)}, r"1 bias has shape \[12\]"),
    ],
    ids=["A", "B", "A fits, B does not", "weight", "weight fits, bias does not"],
)
def test_assigning_wrong_shapes_changes_nothing(expert, values, words):
    model, optimizer = built()
    experts = optimizer.experts["1"]
    before = [experts["fft"].weight, experts["lora_r2"].A.clone(), experts["lora_r2"].B.clone(), model[1].bias.clone()]
    with pytest.raises(ValueError, match=words):
        experts[expert].assign(**values)
    after = [experts["fft"].weight, experts["lora_r2"].A, experts["lora_r2"].B, model[1].bias]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_what_cannot_be_assigned():
    _, optimizer = built()
    experts = optimizer.experts["4"]
    with pytest.raises(ValueError, match="4 has no bias that trains"):
        experts["fft"].assign(bias=torch.zeros(5))
    with pytest.raises(TypeError):
        experts["lora_r2"].assign(torch.zeros(2, 13))


def test_assigning_with_stochastic_rounding():
    model, optimizer = built(torch.bfloat16, bf16_update="stochastic")
    before = model[1].weight.detach().clone()
    optimizer.experts["1"]["lora_r2"].assign(B=torch.ones(13, 2))
    assert not torch.equal(model[1].weight, before)


def test_unknown_modules_and_experts():
    _, optimizer = built()
    for name in ("2", "lm_head", ""):
        with pytest.raises(KeyError, match="is not routed; the 3 routed modules are 1, ..., 5"):
            optimizer.experts[name]
    with pytest.raises(KeyError, match="lora_r4"):
        optimizer.experts["1"]["lora_r4"]
