"""Models whose optimizers step in backward, and copies whose optimizers do not."""

import copy

import torch

from molf import MoLF
from small import Prefer, assert_same_bits

OPTIONS = {
    "epd": (torch.float64, {}),
    "pfn, two winners": (torch.float64, {"score": "pfn", "top_k": 2}),
    "lora everywhere": (torch.float64, {"score": Prefer(1)}),
    "adamw": (torch.float64, {"ranks": ()}),
    "float32": (torch.float32, {}),
    "bf16 split": (torch.bfloat16, {}),
    "bf16 stochastic": (torch.bfloat16, {"bf16_update": "stochastic", "top_k": 2}),
}


def pair_of(model, **options):
    """Return a model whose optimizer steps in backward, and a copy whose optimizer does not."""
    twin, made = copy.deepcopy(model), []
    options = {"ranks": (2, 3), "lr": 1e-2, "lora_lr": 2e-2, **options}
    for m, in_backward in ((model, True), (twin, False)):
        torch.manual_seed(1)
        made.append(MoLF(m, optimizer_in_backward=in_backward, **options))
    return model, made[0], twin, made[1]


def assert_identical(model, optimizer, twin, other):
    assert_same_bits(model, optimizer, twin, other)
    assert optimizer.routing.modules == other.routing.modules
    assert torch.equal(optimizer.routing.scores, other.routing.scores)
    assert torch.equal(optimizer.routing.chosen, other.routing.chosen)
    # The norm is summed in another order.
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
