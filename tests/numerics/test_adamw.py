"""The AdamW arithmetic, seen from outside: against torch's own."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

from conftest import TOLERANCE
from molf import MoLF
from molf.numerics.adamw import Rates, TensorState, Workspace, adamw_update_
from molf.numerics.bf16 import master_dtype
from molf.scores import SCORES
from small import assert_equals_twin, explicit_adamw, explicit_twin, loss_of, mlp, train


def torch_adamw(model, lr=1e-3, weight_decay=0.1, **options):
    """AdamW with the rule of ordinary parameters: decay on matrices, none on vectors."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, **options)


def assert_same(model, twin, atol):
    for (name, p), q in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(p, q[1], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


OPTIONS = [{}, {"betas": (0.7, 0.9), "eps": 1e-4}, {"weight_decay": 0.0}]
# Without averaging a step is the gradient's sign, which float32 noise may turn: float64 only.
CASES = [(dtype, options) for dtype in (torch.float64, torch.float32) for options in OPTIONS]
CASES += [(torch.float64, {"betas": (0.0, 0.0)})]


@pytest.mark.parametrize(("dtype", "options"), CASES, ids=str)
@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: LambdaLR(o, lambda t: min(1.0, t / 5) * 0.95**t),
        lambda o: CosineAnnealingLR(o, 10),
        # If beta1 cycles while beta2 is 0, steps have no bound, and the last bit of one decides.
        lambda o: OneCycleLR(o, max_lr=3e-3, total_steps=25, cycle_momentum=o.defaults["betas"][1] > 0),
    ],
    ids=["warm-up", "cosine", "one-cycle"],
)
def test_no_ranks_is_adamw(dtype, schedule, options):
    model = mlp(dtype)
    twin = copy.deepcopy(model)
    molf, adamw = MoLF(model, ranks=(), lr=1e-3, **options), torch_adamw(twin, **options)
    train(model, molf, 20, schedule(molf))
    train(twin, adamw, 20, schedule(adamw))
    assert_same(model, twin, TOLERANCE[dtype])


def step_alike(model, twin, molf, adamw, steps=3, draw=torch.randn_like):
    """Take steps with the same drawn gradients."""
    for _ in range(steps):
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = draw(p)
            q.grad = p.grad.clone()
        molf.step()
        adamw.step()


def test_layers_of_many_elements():
    """Large enough that work in blocks crosses from one block to the next inside a tensor."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(300, 1100), nn.Linear(1100, 1009), nn.LayerNorm(1009))
    twin = copy.deepcopy(model)
    step_alike(model, twin, MoLF(model, ranks=(), lr=1e-3), torch_adamw(twin))
    assert_same(model, twin, TOLERANCE[torch.float32])


def transposed(p):
    return torch.randn(p.shape[::-1], dtype=p.dtype).permute(*reversed(range(p.ndim)))


def expanded(p):
    return transposed(p).flatten()[:1].expand(p.shape)


@pytest.mark.parametrize("draw", [transposed, expanded])
def test_gradients_in_any_memory_layout(draw):
    model = mlp()
    twin = copy.deepcopy(model)
    step_alike(model, twin, MoLF(model, ranks=(), lr=1e-3), torch_adamw(twin), draw=draw)
    assert_same(model, twin, TOLERANCE[torch.float64])


def test_layers_of_several_dtypes_in_one_model():
    model = mlp(torch.float32)
    model[1].double()
    model[4].bfloat16()
    twin = copy.deepcopy(model)
    step_alike(model, twin, MoLF(model, ranks=(), lr=1e-3), torch_adamw(twin, foreach=False), 1)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=TOLERANCE[p.dtype])


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_does_not_matter(default):
    """Step counts above 256 do not fit bf16."""
    model = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 4)).double()
    twin = copy.deepcopy(model)
    molf, adamw = MoLF(model, ranks=(), lr=1e-3), torch_adamw(twin)
    torch.set_default_dtype(default)
    try:
        step_alike(model, twin, molf, adamw, 260)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(model, twin, TOLERANCE[torch.float64])


@pytest.mark.parametrize("shape", [(700, 900), (3, 5), (1, 1)], ids=str)
@pytest.mark.parametrize("score", ["epd", "pfn"])
def test_scores_are_those_of_the_moments_in_the_state(shape, score):
    """The scores that the step computes on the way are those of the equations."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(shape[1], shape[0]))
    molf = MoLF(model, ranks=(1,), lr=1e-3, lora_lr=2e-3, score=score, eps=1e-6)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        molf.step()
    weight, bias = model[0].weight, model[0].bias
    own = molf.state[weight]
    fft = [molf.state[p] for p in (weight, bias)]
    lora = [{k: own[f"lora_r1.{leaf}.{k}"] for k in ("exp_avg", "exp_avg_sq")} for leaf in "AB"]
    for column, (tensors, lr) in enumerate([(fft, 1e-3), (lora, 2e-3)]):
        m = torch.cat([t["exp_avg"].double().flatten() for t in tensors])
        v = torch.cat([t["exp_avg_sq"].double().flatten() for t in tensors])
        total = SCORES[score].term(m, v, 1e-6).sum()
        expected = SCORES[score].finish(total, torch.tensor(float(m.numel())), torch.tensor(lr, dtype=torch.float64))
        assert molf.routing.scores[0, column].item() == pytest.approx(expected.item(), rel=1e-5)


def test_every_group_follows_its_own_settings():
    model = mlp()
    twin = copy.deepcopy(model)
    molf = MoLF(model, ranks=(), lr=1e-3)
    settings = [
        {"lr": 1e-3 * (i + 1), "weight_decay": 0.1 * i, "betas": (0.9 - 0.1 * i, 0.99), "eps": 10.0 ** -(i + 3)}
        for i in range(len(molf.param_groups))
    ]
    names = {id(p): name for name, p in model.named_parameters()}
    groups = []
    for group, own in zip(molf.param_groups, settings, strict=True):
        group.update(own)
        params = [twin.get_parameter(names[id(p)]) for p in group["params"]]
        groups += [{"params": [p], **own, **({"weight_decay": 0.0} if p.ndim < 2 else {})} for p in params]
    molf.param_groups[1]["weight_decay"] = 0.0  # norms
    adamw = torch.optim.AdamW(groups)
    train(model, molf, 8)
    train(twin, adamw, 8)
    assert_same(model, twin, TOLERANCE[torch.float64])


@pytest.mark.parametrize("ranks", [(2,), (1, 3), (3, 2, 5)], ids=str)
def test_all_experts_win_is_adamw_on_explicit_experts(ranks):
    model = mlp()
    molf = MoLF(model, ranks=ranks, top_k=len(ranks) + 1, lr=1e-3, lora_lr=3e-3)
    twin = explicit_twin(model, molf)
    adamw = explicit_adamw(twin, lr=1e-3, lora_lr=3e-3)

    for m, optimizer in ((model, molf), (twin, adamw)):
        train(m, optimizer, 15, LambdaLR(optimizer, lambda t: min(1.0, t / 4) * 0.9**t))
    assert_equals_twin(model, molf, twin, TOLERANCE[torch.float64])
    assert loss_of(model, 0).item() == pytest.approx(loss_of(twin, 0).item(), abs=TOLERANCE[torch.float64])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_step_leaves_the_moments_as_phase_1_left_them(dtype):
    """Small, large and zero moments, to the last bit."""
    generator = torch.Generator().manual_seed(0)
    m = torch.randn(5000, generator=generator) * 10 ** torch.empty(5000).uniform_(-18, 6, generator=generator)
    v = m.square() * torch.rand(5000, generator=generator)
    m[:3], v[:2] = 0.0, 0.0
    moments = [x.to(master_dtype(dtype)) for x in (m, v)]
    p = torch.ones(5000, dtype=dtype)
    before = [x.clone() for x in (p, *moments)]
    low = torch.zeros(5000, dtype=torch.int16) if dtype == torch.bfloat16 else None
    rates = Rates(lr=1e-2, weight_decay=0.1, betas=(0.9, 0.999), eps=1e-8, t=3)
    adamw_update_([TensorState(p, None, *moments, low)], rates, Workspace())
    assert not torch.equal(p, before[0])
    assert all(torch.equal(x, was) for x, was in zip(moments, before[1:], strict=True))
