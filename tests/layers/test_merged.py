import pytest
import torch

from conftest import TOLERANCE
from molf import MoLF
from molf.layers.merged import LoraPair, apply_lora_delta_, base_weight, decay_base_, expert_gradients
from small import Prefer, differing, mlp, snapshot, train


def random_pair(rank, dtype=torch.float64, scale=1.7, n_out=6, n_in=9):
    return LoraPair(torch.randn(rank, n_in, dtype=dtype), torch.randn(n_out, rank, dtype=dtype), scale)


def product(pairs):
    return sum(pair.scale * pair.B @ pair.A for pair in pairs)


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_expert_gradients_are_those_of_autograd(rank):
    A, B, scale, _ = random_pair(rank)
    W, x = torch.randn(6, 9, dtype=torch.float64), torch.randn(5, 9, dtype=torch.float64)
    for tensor in (A, B, W):
        tensor.requires_grad_()
    (x @ (W + scale * B @ A).T).square().sum().backward()
    dA, dB = expert_gradients(W.grad, LoraPair(A.detach(), B.detach(), scale))
    torch.testing.assert_close(dA, A.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dB, B.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ranks", [(), (2,), (1, 3, 9)], ids=str)
def test_base_weight_and_its_decay(ranks):
    pairs, W = [random_pair(r) for r in ranks], torch.randn(6, 9, dtype=torch.float64)
    effective = W + product(pairs) if pairs else W.clone()
    kept = effective.clone()
    base = base_weight(effective, pairs)
    torch.testing.assert_close(base, W, rtol=0, atol=1e-12)
    assert torch.equal(effective, kept) and base.data_ptr() != effective.data_ptr()
    decay_base_(effective, pairs, 0.25)
    expected = 0.75 * W + (product(pairs) if pairs else 0)
    torch.testing.assert_close(effective, expected, rtol=0, atol=1e-12)


def test_delta_does_not_cancel():
    """In float32 the difference of two large products loses a small change; the delta does not."""
    before = random_pair(8, torch.float32, scale=100.0)
    after = LoraPair(before.A + 1e-6 * torch.randn(8, 9), before.B + 1e-6 * torch.randn(6, 8), 100.0)
    exact = product([LoraPair(*(x.double() for x in after[:2]), 100.0)])
    exact -= product([LoraPair(*(x.double() for x in before[:2]), 100.0)])
    updated = torch.zeros(6, 9)
    apply_lora_delta_(updated, before, after)
    error = (updated.double() - exact).abs().max()
    naive_error = ((product([after]) - product([before])).double() - exact).abs().max()
    assert error < 1e-6 * exact.abs().max()
    assert naive_error > 100 * error


def optimizer_of(model, column, bf16_update="split", **options):
    return MoLF(model, ranks=(2, 3), score=Prefer(column), lr=1e-2, lora_lr=2e-2, bf16_update=bf16_update, **options)


@pytest.mark.parametrize("winner", ["fft", "lora_r2", "lora_r3"])
@pytest.mark.parametrize(
    ("dtype", "bf16_update"), [*((dtype, "split") for dtype in TOLERANCE), (torch.bfloat16, "stochastic")], ids=str
)
def test_losers_keep_every_bit_and_all_moments_move(dtype, bf16_update, winner):
    model = mlp(dtype)
    optimizer = optimizer_of(model, 0, bf16_update)
    for column in (0, 1, 2, 0):  # every B becomes nonzero, so that every gradient is nonzero
        optimizer.score = Prefer(column)
        train(model, optimizer, 1)
    optimizer.score = Prefer(("fft", "lora_r2", "lora_r3").index(winner))
    before = snapshot(model, optimizer)
    base = {name: experts["fft"].weight for name, experts in optimizer.experts.items()}
    assert train(model, optimizer, range(4, 5)) == [{name: [winner] for name in base}]
    changed = differing(before, snapshot(model, optimizer))

    moments = {key for key in before if "exp_avg" in key or key.endswith(".step")}
    assert moments <= changed
    for name in base:
        assert (f"model.{name}.weight" in changed) or dtype == torch.bfloat16
        if f"model.{name}.bias" in before and winner != "fft":
            assert f"model.{name}.bias" not in changed
    values = {key for key in changed - moments if key.endswith((".A", ".B"))}
    assert {key.split(".")[-2] for key in values} == ({winner} - {"fft"})
    if winner != "fft":
        biases = [model[1].bias, model[5].bias]
        ids = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
        assert not changed & {f"state.{ids[id(bias)]}.low" for bias in biases}
        if bf16_update == "split":
            for name, W in base.items():
                atol = TOLERANCE[torch.float64 if dtype == torch.float64 else torch.float32]
                torch.testing.assert_close(optimizer.experts[name]["fft"].weight, W, rtol=0, atol=atol)


@pytest.mark.parametrize("columns", [(1,), (0,)], ids=["lora wins", "fft wins"])
def test_effective_weight_stays_the_sum_of_the_experts(columns):
    """W is derived: over many steps it must not drift from the sum of the experts."""
    model = mlp()
    optimizer = optimizer_of(model, columns[0], weight_decay=0.0)
    start = {name: experts["fft"].weight for name, experts in optimizer.experts.items()}
    train(model, optimizer, 60)
    for name, W in start.items():
        moved = (optimizer.experts[name]["fft"].weight - W).abs().max().item()
        assert moved > 0.1 if columns == (0,) else moved < TOLERANCE[torch.float64]


def test_updates_are_counted_and_the_count_survives_loading():
    model = mlp(torch.float32)
    optimizer = MoLF(model, ranks=(2,), lr=1e-3, score=Prefer(1))
    train(model, optimizer, 3)
    other = MoLF(mlp(torch.float32), ranks=(2,), lr=1e-3)
    other.load_state_dict(optimizer.state_dict())
    wins = other.state[other.param_groups[-1]["params"][0]]["lora_r2.wins"]
    assert wins.item() == 3 and wins.dtype == torch.float32 and wins.device.type == "cpu"


def test_an_assigned_pair_counts_as_updated():
    model = mlp()
    optimizer = MoLF(model, ranks=(2,), lr=1e-3)
    expert = optimizer.experts["1"]["lora_r2"]
    assert optimizer.state[model[1].weight]["lora_r2.wins"] == 0
    expert.assign(B=torch.ones(13, 2))
    assert optimizer.state[model[1].weight]["lora_r2.wins"] == 1


def test_state_is_flat_tensors_with_plain_names():
    model = mlp(torch.bfloat16)
    optimizer = MoLF(model, ranks=(2,), lr=1e-3)
    train(model, optimizer, 1)
    own = optimizer.state[model[1].weight]
    expected = {"step", "exp_avg", "exp_avg_sq", "low"}
    expected |= {f"lora_r2.{leaf}{end}" for leaf in "AB" for end in ("", ".exp_avg", ".exp_avg_sq")}
    assert set(own) == expected | {"lora_r2.wins"}
    assert all(isinstance(value, torch.Tensor) for value in own.values())
    dtypes = {value.dtype for key, value in own.items() if key != "low"}
    assert dtypes == {torch.float32} and own["low"].dtype == torch.int16
    assert own["lora_r2.A"].shape == (2, 7) and own["lora_r2.B"].shape == (13, 2)
