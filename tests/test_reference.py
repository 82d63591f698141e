"""The fast path against the oracle in plain loops, over shapes, ranks, scores, K, rates and dtypes."""

import copy

import pytest
import torch

from conftest import TOLERANCE
from molf import MoLF
from molf.reference import ReferenceMoLF
from small import mlp


def run(model, optimizer, steps, schedule=lambda t: 1.0):
    generator = torch.Generator().manual_seed(1)
    base = [group["lr"] for group in getattr(optimizer, "groups", None) or optimizer.param_groups]
    winners = []
    for t in range(steps):
        for group, lr in zip(getattr(optimizer, "groups", None) or optimizer.param_groups, base, strict=True):
            group["lr"] = lr * schedule(t)
        model.zero_grad()
        ids = torch.randint(0, 11, (4, 6), generator=generator)
        target = torch.randn(4, 6, 3, generator=generator).to(model[-1].weight.dtype)
        (model(ids) - target).square().mean().backward()
        optimizer.step()
        winners.append(optimizer.winners if hasattr(optimizer, "winners") else optimizer.routing.winners())
        winners[-1] = copy.deepcopy(winners[-1])
    return winners


CASES = [
    {"ranks": (2,), "lora_lr": None, "lora_alpha": 6.0},
    {"ranks": (2,), "lr": 1e-3, "lora_lr": 5e-3},
    {"ranks": (1, 3), "top_k": 2, "lora_alpha": (4.0, 8.0)},
    {"ranks": (1, 3, 2), "top_k": 3, "score": "pfn", "use_rslora": False},
    {"ranks": (3,), "score": "pfn", "weight_decay": 0.0, "lora_weight_decay": 0.3},
    {"ranks": (3,), "top_k": 2, "betas": (0.8, 0.95), "eps": 1e-4},
    {"ranks": (4,), "target_modules": ["1", "5"]},
    {"ranks": (2, 3), "score": "descent", "lora_lr": 4e-3, "lora_alpha": 6.0},
    {"ranks": (2, 3), "score": "pfn", "lora_lr": "matched"},
    {"ranks": (2, 3), "score": "coherence", "lora_lr": "matched"},
    {"ranks": (1, 3), "top_k": 3, "lora_lr": "matched", "lora_alpha": (4.0, 8.0)},
    {"ranks": ()},
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fast_path_equals_the_oracle(case, dtype):
    options = {"lr": 2e-3, "score": "epd", **case}
    model = mlp(dtype)
    twin = copy.deepcopy(model)
    torch.manual_seed(5)
    fast = MoLF(model, **options)
    torch.manual_seed(5)
    slow = ReferenceMoLF(twin, **options)

    def schedule(t):
        return min(1.0, t / 3) * (0.9**t)  # a warm-up from 0

    got, want = run(model, fast, 12, schedule), run(twin, slow, 12, schedule)
    if dtype == torch.float32:  # the order among several winners may hang on the last bit
        got, want = ([{m: sorted(w) for m, w in step.items()} for step in side] for side in (got, want))
    assert got == want
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=TOLERANCE[dtype], msg=lambda m, n=name: f"{n}: {m}")
    for module, experts in slow.experts.items():
        for expert in experts:
            view = fast.experts[module][expert.name]
            for leaf, weight in expert.weights.items():
                torch.testing.assert_close(getattr(view, leaf), weight.value, rtol=0, atol=TOLERANCE[dtype])
        got = fast.routing.scores[fast.routing.modules.index(module)].tolist()
        assert got == pytest.approx(list(slow.scores[module].values()), rel=1e-4 if dtype == torch.float32 else 1e-10)


def test_a_score_that_it_does_not_know():
    with pytest.raises(ValueError, match="score='random': the reference knows epd, pfn, descent, coherence"):
        ReferenceMoLF(mlp(), ranks=(2,), score="random")


def test_both_experts_win_somewhere():
    """The comparison above would say little if one expert won everything."""
    model = mlp(torch.float64)
    optimizer = MoLF(model, ranks=(2,), lr=2e-3, lora_lr=None, lora_alpha=6.0)
    chosen = {expert for step in run(model, optimizer, 12) for experts in step.values() for expert in experts}
    assert chosen == {"fft", "lora_r2"}
