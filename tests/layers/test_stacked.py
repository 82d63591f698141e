"""Stacked matrices take the steps and decisions of the same matrices in linear layers."""

import copy

import pytest
import torch

import molf.optimizer.torch_step
from conftest import TOLERANCE
from molf import MoLF
from molf.errors import MolfError
from molf.reference import ReferenceMoLF
from small import assert_same_bits
from stacks import N, Shuffled, Stacks, backward, pair_of, state_of, twin_name

OPTIONS = [
    {},
    {"top_k": 2},
    {"top_k": 3, "max_grad_norm": 0.1},
    {"score": "pfn"},
    {"score": "coherence", "lora_lr": "matched"},
    {"score": "descent", "weight_decay": 0.0},
    {"ranks": (2,), "max_grad_norm": 0.1},
    {"ranks": ()},
    {"optimizer_in_backward": True},
]


def compare(options, dtype=torch.float64, transposed=False, steps=6):
    stacks, optimizer, twin, other = pair_of(dtype, transposed, **options)
    won = set()
    for t in range(steps):
        for model in (stacks, twin):
            backward(model, t)
        optimizer.step()
        other.step()
        winners = {twin_name(name): experts for name, experts in optimizer.routing.winners().items()}
        assert winners == other.routing.winners()
        won |= {tuple(experts) for experts in winners.values()}
        here, there = state_of(stacks, optimizer), state_of(twin, other)
        assert here.keys() == there.keys()
        for name, value in here.items():
            torch.testing.assert_close(
                value, there[name], rtol=0, atol=TOLERANCE[dtype], msg=lambda m, n=name: f"{n}: {m}"
            )
    return won


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_stacked_and_unstacked_experts_are_equal(options, transposed):
    compare(options, transposed=transposed)


@pytest.mark.parametrize(
    "options", [{"score": "epd"}, {"score": "epd", "top_k": 2, "lora_lr": "matched"}, {"score": "pfn"}], ids=str
)
def test_every_step_equals_the_oracle(options):
    """The oracle takes one matrix after the other, from the same start."""
    torch.manual_seed(5)
    stacks = torch.nn.Sequential(torch.nn.Linear(4, 6), Stacks(transposed=True)).double()
    twin = copy.deepcopy(stacks)
    options = {"ranks": (2, 3), "lr": 1e-2, **options}
    optimizer, oracle = MoLF(stacks, **options), ReferenceMoLF(twin, **options)
    for t in range(5):
        for model in (stacks, twin):
            backward(model, t)
        optimizer.step()
        oracle.step()
        assert {name: sorted(won) for name, won in optimizer.routing.winners().items()} == {
            name: sorted(won) for name, won in oracle.winners.items()
        }
        for p, q in zip(stacks.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("part", [1, 120, 1 << 17])
def test_parts_of_a_stack_are_equal_to_all_of_it(part, monkeypatch):
    """One matrix a part, two, and all; in some steps every expert wins somewhere."""
    monkeypatch.setattr(molf.optimizer.torch_step, "_CPU_STACK", part)
    won = compare({"lora_lr": "matched", "score": Shuffled(), "max_grad_norm": 0.1})
    assert won == {("fft",), ("lora_r2",), ("lora_r3",)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    stacks, optimizer, twin, other = pair_of(dtype)
    for t in range(4):
        for model in (stacks, twin):
            backward(model, t)
        for name, p in twin.named_parameters():  # bf16 sums round by the order of the rows
            stack, _, i = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")
            key = f"{stack}_bias" if name.endswith("bias") else stack
            if stack:
                p.grad = dict(stacks.named_parameters())[key].grad[int(i)].clone()
        optimizer.step()
        other.step()
    for name, value in state_of(stacks, optimizer).items():
        torch.testing.assert_close(value, state_of(twin, other)[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"score": "pfn"}, {"optimizer_in_backward": True}], ids=str)
def test_autocast_around_a_step_has_no_say(options):
    """Gradients are so small that sums of scores in half precision would be 0 everywhere, a tie."""
    ends = []
    for enabled in (False, True):
        stacks, optimizer, *_ = pair_of(torch.float32, **options)
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            for t in range(2):
                optimizer.zero_grad()
                generator = torch.Generator().manual_seed(t)
                noise = [torch.randn(p.shape, generator=generator) for p in stacks.parameters()]
                sum((1e-7 * x * p).sum() for x, p in zip(noise, stacks.parameters(), strict=True)).backward()
                optimizer.step()
        ends.append((optimizer.routing.scores, stacks, optimizer))
    assert torch.equal(ends[0][0], ends[1][0])
    assert_same_bits(*ends[0][1:], *ends[1][1:])


def test_a_matrix_that_no_token_reached_decays_as_adamw_does():
    """Without a gradient from the start, no expert wins by rounding: fft wins the tie, and its step is decay alone."""
    stacks, optimizer, *_ = pair_of(ranks=(2,), weight_decay=0.5)
    idle = stacks[1].down_proj[-1].detach().clone()
    for t in range(3):
        backward(stacks, t)
        assert not stacks[1].down_proj.grad[-1].any()
        optimizer.step()
        row = optimizer.routing.modules.index(f"1.down_proj[{N - 1}]")
        assert optimizer.routing.scores[row].tolist() == [0.0, 0.0]
        assert optimizer.routing.winners()[f"1.down_proj[{N - 1}]"] == ["fft"]
    torch.testing.assert_close(stacks[1].down_proj[-1], idle * (1 - 1e-2 * 0.5) ** 3, rtol=0, atol=1e-14)


def test_losers_keep_their_pairs_bit_for_bit():
    stacks, optimizer, *_ = pair_of(torch.float32, score="random", lora_lr="matched")
    names = ("lora_r2", "lora_r3")
    for t in range(5):
        before = {
            m: {name: (e[name].A.clone(), e[name].B.clone()) for name in names} for m, e in optimizer.experts.items()
        }
        backward(stacks, t)
        optimizer.step()
        for module, winners in optimizer.routing.winners().items():
            for name in names:
                now = optimizer.experts[module][name]
                kept = torch.equal(now.A, before[module][name][0]) and torch.equal(now.B, before[module][name][1])
                assert kept == (name not in winners)


@pytest.mark.parametrize("options", [{}, {"optim_bits": 8}, {"score": "random"}], ids=str)
def test_a_resumed_run_is_the_same_bit_for_bit(options):
    def fresh():
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(4, 6), Stacks(n=130))
        return model, MoLF(model, ranks=(2,), lr=1e-2, **options)

    model, optimizer = fresh()
    for t in range(3):
        backward_many(model, t)
        optimizer.step()
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    again, resumed = fresh()
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for t in range(3, 6):
        for m, o in ((model, optimizer), (again, resumed)):
            backward_many(m, t)
            o.step()
    assert_same_bits(model, optimizer, again, resumed)


def backward_many(model, t):
    model.zero_grad()
    generator = torch.Generator().manual_seed(t)
    model(torch.randn(260, 4, generator=generator)).square().mean().backward()


def test_eight_bits_follow_full_precision():
    """Codes of a stack are those of its matrices: winners and losers are written back, and the weights stay close."""
    ends = []
    for bits in (32, 8):
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(4, 6), Stacks(n=130))
        start = model[1].up_proj.detach().clone()
        optimizer = MoLF(model, ranks=(2,), lr=1e-3, score="random", lora_lr="matched", optim_bits=bits)
        for t in range(5):
            backward_many(model, t)
            optimizer.step()
        ends.append(model[1].up_proj.detach() - start)
        kinds = {key: value.dtype for key, value in optimizer.state[model[1].up_proj].items()}
        assert (kinds["exp_avg"] == torch.uint8) == (bits == 8) and kinds["lora_r2.A.exp_avg"] == torch.float32
    assert (ends[0] - ends[1]).norm() < 0.2 * ends[0].norm()


def test_a_state_of_other_stacks_is_refused():
    stacks, optimizer, *_ = pair_of()
    backward(stacks, 0)
    optimizer.step()
    _, other, *_ = pair_of(transposed=True)
    with pytest.raises(MolfError, match=r"transposed"):
        other.load_state_dict(optimizer.state_dict())
    state = optimizer.state_dict()
    entries = next(own for own in state["state"].values() if "lora_r2.A" in own and own["lora_r2.A"].ndim == 3)
    entries["lora_r2.A"] = entries["lora_r2.A"][:-1]
    with pytest.raises(MolfError, match=r"1\.up_proj lora_r2\.A is \[5, 2, 6\] here and \[4, 2, 6\] in the state"):
        pair_of()[1].load_state_dict(state)


def test_views_assign_to_one_matrix():
    stacks, optimizer, *_ = pair_of(transposed=True)
    backward(stacks, 0)
    optimizer.step()
    before = stacks[1].up_proj.detach().clone()
    expert = optimizer.experts["1.up_proj[2]"]
    assert expert["fft"].weight.shape == (9, 6) and expert["lora_r2"].B.shape == (9, 2)
    W, B = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
    expert["fft"].assign(weight=W, bias=torch.ones(9, dtype=torch.float64))
    expert["lora_r2"].assign(B=B)
    torch.testing.assert_close(expert["fft"].weight, W, rtol=0, atol=1e-12)
    assert torch.equal(expert["lora_r2"].B, B) and torch.equal(stacks[1].up_proj_bias[2].detach(), expert["fft"].bias)
    pairs = [expert[name] for name in ("lora_r2", "lora_r3")]
    effective = W + sum(pair.scale * pair.B @ pair.A for pair in pairs)
    torch.testing.assert_close(stacks[1].up_proj[2].T, effective, rtol=0, atol=1e-12)
    others = [i for i in range(N) if i != 2]
    assert torch.equal(stacks[1].up_proj[others], before[others])
    with pytest.raises(KeyError, match=r"1\.up_proj\[9\]"):
        optimizer.experts["1.up_proj[9]"]


def test_a_pair_of_single_elements_can_be_assigned_to():
    stacks = Stacks(n=2)
    stacks.up_proj, stacks.up_proj_bias = torch.nn.Parameter(torch.ones(2, 1, 1)), None
    expert = MoLF(stacks, ranks=(1,), target_modules=["up_proj"]).experts["up_proj[1]"]["lora_r1"]
    expert.assign(B=torch.ones(1, 1))
    torch.testing.assert_close(
        stacks.up_proj.flatten(), torch.stack([torch.ones(()), 1 + expert.scale * expert.A.sum()])
    )
